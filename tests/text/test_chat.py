"""Conversations: only new text is processed, and the result is that of processing all of it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from flashinfer import FormatError, Model, UserError
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.convert import convert
from flashinfer.formats.sources.tokenizers.parts import added_tokens, byte_level_bpe
from flashinfer.formats.sources.tokenizers.pre_tokenizers import GPT2, split
from flashinfer.plan import memory
from flashinfer.text import worker

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from flashinfer.text.chat import Conversation, chat_tokenizer  # noqa: E402
from flashinfer.text.tokenizer import HEADROOM  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY = {"temperature": 0}


def checkpoint(folder, template=CHATML, context=400):
    """A random Qwen2 that speaks bytes, and ends its text with one of two tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*alphabet, *special])}
    random, width, ffn, layer = np.random.default_rng(5), 64, 96, "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (len(vocab), width), "model.norm.weight": (width,),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}post_attention_layernorm.weight": (width,),
        **{f"{layer}self_attn.{p}_proj.weight": (width, width) for p in "qkvo"},
        **{f"{layer}self_attn.{p}_proj.bias": (width,) for p in "qkv"},
        f"{layer}mlp.gate_proj.weight": (ffn, width), f"{layer}mlp.up_proj.weight": (ffn, width),
        f"{layer}mlp.down_proj.weight": (width, ffn), "lm_head.weight": (len(vocab), width),
    }  # fmt: skip
    folder.mkdir()
    safetensors.numpy.save_file(
        {n: random.standard_normal(s, dtype=np.float32) / 3 for n, s in shapes.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": ffn,
        "vocab_size": len(vocab), "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": context, "hidden_act": "relu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    ends = {"eos_token_id": [vocab["<|im_end|>"], vocab["<|endoftext|>"]]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    tokenizer = byte_level_bpe(vocab, [], added_tokens(vocab, special), split((GPT2,)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    convert(checkpoint(folder / "hf"), folder / "x.flash")
    return folder / "x.flash"


def test_only_new_text_is_processed_and_the_reply_is_the_same(path):
    with Model.open(path) as model:
        talk = Conversation(model, "Be brief.")
        for turn in range(3):
            reply = "".join(talk.say(f"Number {turn}?", 20, **GREEDY))
            processed, ids = model.stats.prompt.tokens, talk.ids()
            history = talk.messages[:-1]
            with Model.open(path) as fresh:
                other = Conversation(fresh, "Be brief.")
                other.messages = history[:-1]
                assert "".join(other.say(f"Number {turn}?", 20, **GREEDY)) == reply
                whole = fresh.stats.prompt.tokens
            assert processed == whole if turn == 0 else processed < whole - 20
            assert talk.messages[-1] == {"role": "assistant", "content": reply}
            assert len(ids) > whole


def test_a_reply_that_is_stopped_stays_in_the_conversation(path):
    with Model.open(path) as model:
        talk = Conversation(model)
        pieces = talk.say("Hello", 200, **GREEDY)
        begun = next(pieces) + next(pieces)
        pieces.close()
        assert talk.messages[-1] == {"role": "assistant", "content": begun}
        assert "".join(talk.say("Go on", 5, **GREEDY))
        talk.reset()
        assert talk.messages == []


def test_every_end_of_text_ends_a_reply(path):
    with Model.open(path) as model:
        assert len(model.config.eos_token_ids) == 2
        for end in model.config.eos_token_ids:
            forward = model._forward
            logits = np.zeros(model.config.vocab_size, dtype=np.float32)
            logits[end] = 1
            model._forward = lambda ids, forward=forward, logits=logits: (forward(ids), logits)[1]
            talk = Conversation(model)
            assert "".join(talk.say("Hello", 20, **GREEDY)) == ""
            assert len(model.stats.token_ids) == 1
            model._forward = forward


def test_templates_find_what_transformers_gives_them(tmp_path):
    """The tokenizer's own special tokens, the filter tojson and the tag generation."""
    transformers = pytest.importorskip("transformers")
    template = (
        "{{ bos_token }}{{ messages | tojson }}{{ {'b': '<\u00e9>', 'a': 1} | tojson(indent=1) }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
        "{% endfor %}{{ pad_token }}"
    )
    folder = checkpoint(tmp_path / "hf", template)
    end = {"__type": "AddedToken", "content": "<|endoftext|>"}
    settings = {"bos_token": "<|im_start|>", "eos_token": end}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(folder, tmp_path / "x.flash")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with Model.open(tmp_path / "x.flash") as model:
        talk = Conversation(model)
        talk.messages = [{"role": "user", "content": "Hi \u00e9"}]
        expected = theirs.apply_chat_template(
            talk.messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )
        assert talk.ids() == expected


def test_what_was_said_before_an_error_stays(path):
    """The model is given another text in the middle of a reply."""
    with Model.open(path) as model:
        talk = Conversation(model)
        reply = talk.say("Hello", 20, temperature=5.0, seed=1)
        shown = next(reply) + next(reply)
        model.reset()
        with pytest.raises(UserError, match="another text was begun"):
            list(reply)
        assert [m["role"] for m in talk.messages] == ["user", "assistant"]
        assert talk.messages[-1]["content"] == shown
        model.close()
        with pytest.raises(UserError, match="the model is closed"):
            list(talk.say("And now?", 5))
        assert len(talk.messages) == 2


def test_the_contexts_end(path):
    with Model.open(path, context=120) as model:
        talk = Conversation(model)
        assert "".join(talk.say("a" * 60, 500, **GREEDY))
        said = list(talk.messages)
        with pytest.raises(UserError, match=r"do not fit the context of 120; /reset"):
            list(talk.say("b" * 60, 5))
        assert talk.messages == said


@pytest.mark.parametrize(
    "template, says, kind",
    [
        (None, "has no chat template; use flashinfer run", UserError),
        ("{% if %}", "its chat template is damaged", FormatError),
        ("a" * (1 << 20) + "b", "its chat template of 1048577 bytes is too long", FormatError),
        ("{{ raise_exception('only users') }}", "refuses this conversation: only users", UserError),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this", UserError),
        ("{{ messages.append(1) }}", "refuses this", UserError),
    ],
)
def test_templates_that_cannot_be_used(template, says, kind, tmp_path):
    convert(checkpoint(tmp_path / "hf", template), tmp_path / "x.flash")
    with Model.open(tmp_path / "x.flash") as model, pytest.raises(kind, match=says):
        list(Conversation(model).say("Hello", 5))


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2,
    "nested loops": "{% for x in range(9) %}" * 19 + "{% endfor %}" * 19,
    "deeply nested loops": "{% for x in range(9) %}" * 40 + "{% endfor %}" * 40,
    "a power": "{{ 9999999 ** 9999999 ** 99 }}",
    "a width": "{{ 'a'.center(999999999999) }}",
    "a wide format": "{{ '%999999999999d' | format(1) }}",
    "a long string": "{{ ('a' * 99999) * 99999 * 99 }}",
    "a long list": "{{ [[0] * 99999999] * 99999999 }}",
    "a growing string": "{% set ns = namespace(t='ab') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "a long reply": "{% for a in range(99999) %}{{ 'word ' * 99 }}{% endfor %}",
    "a lone surrogate": "{{ '\\ud800' }}",
    "a time": "{{ strftime_now('%9999999999d' * 9999) }}",
    "a module": "{{ strftime_now.__globals__ }}",
    "no end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_one_line_in_time(path, template, monkeypatch):
    assert worker.SECONDS < 10
    monkeypatch.setattr(worker, "SECONDS", 2)
    with Model.open(path) as model:
        talk = Conversation(model)
        start = time.monotonic()
        with pytest.raises(UserError) as raised:
            talk.tokenizer.use_template(template)
            list(talk.say("Hello", 5))
        assert time.monotonic() - start < 4
        assert "\n" not in str(raised.value) and talk.messages == []
        talk.tokenizer.begin()
        talk.tokenizer.use_template(CHATML)
        assert list(talk.say("Hello", 5))
        talk.tokenizer.close()


def test_a_template_costs_milliseconds_and_counts_in_the_plan(path):
    with Bundle(path) as bundle:
        tokenizer = chat_tokenizer(bundle, 400)
    with Model.open(path) as model:
        aside = memory.helpers[tokenizer.worker.process.pid]
        assert aside > HEADROOM and model.plan.base > memory.held()[1] // 2 + aside
        talk = Conversation(model, tokenizer=tokenizer)
        talk.messages = [{"role": "user", "content": "Hello"}] * 10
        talk.ids()
        start = time.perf_counter()
        for _ in range(10):
            talk.ids()
        assert (time.perf_counter() - start) / 10 < 0.1
    tokenizer.close()


def chat(path, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "flashinfer", "chat", str(path), "--temp", "0", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_commands(path):
    lines = "Hello\n/reset\nHello\n/system Be brief.\nHello\n/nonsense\n/exit\nnever read\n"
    out, err = chat(path, "-n", "12").communicate(lines, timeout=60)
    assert "no command /nonsense; /system TEXT" in err
    replies = out.split("\n")
    assert len(replies) >= 3 and out.strip()
    with Model.open(path) as model:
        talk = Conversation(model)
        first = "".join(talk.say("Hello", 12, **GREEDY))
        talk.system = "Be brief."
        talk.reset()
        third = "".join(talk.say("Hello", 12, **GREEDY))
    assert out == f"{first}\n{first}\n{third}\n"


def test_ctrl_c_stops_a_template_and_leaves_no_process(tmp_path):
    convert(checkpoint(tmp_path / "hf", HOSTILE["nested ranges"]), tmp_path / "x.flash")
    process = chat(tmp_path / "x.flash")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this kernel does not list a process's children")
    process.stdin.write("Hello\n")
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not (workers := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)  # it has read the line
    process.send_signal(signal.SIGINT)
    while children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.05)
    _, err = process.communicate("/exit\n", timeout=60)
    assert process.returncode == 0 and "(stopped)" in err and "Traceback" not in err
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_lines_that_cannot_be_used_leave_the_conversation_as_it_is(path):
    process = subprocess.Popen(
        [sys.executable, "-m", "flashinfer", "chat", str(path), "--temp", "0", "-n", "12"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lines = b"a" * 1_000_000 + b"\nHello\xff\nHello\n"
    out, err = process.communicate(lines, timeout=60)
    with Model.open(path) as model:
        talk = Conversation(model)
        assert out.decode() == "".join(talk.say("Hello", 12, **GREEDY)) + "\n"
    _, long, strange, end = err.decode().split("\n")
    assert "the line has more than" in long and "the line: is not UTF-8" in strange and not end
    assert process.returncode == 0


def test_a_system_message_that_is_not_utf8(path):
    process = chat(path, "--system", b"a\xff")
    _, err = process.communicate("", timeout=60)
    assert process.returncode == 1 and err == "flashinfer: error: --system: is not UTF-8 text\n"


def test_ctrl_c_stops_the_reply_and_not_the_program(path):
    process = chat(path, "-n", "390", "-c", "400")
    process.stdin.write("Hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate("/exit\n", timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
