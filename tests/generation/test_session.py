"""Sessions: a text goes on with the bits that it would have had without the stop, and what a file
says is not trusted."""

import json
import os
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.numpy
from fuzz_files import changed
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DATA
from flashinfer import FormatError, Model, UserError, kernels
from flashinfer.cli.run import demo_model
from flashinfer.formats.convert import convert
from flashinfer.generation.session import peek
from flashinfer.transformer.kv_cache import KV_DTYPES

DEMO = str(demo_model())
# Rotary, learned, alibi and long positions; windows, caps, sinks; predictors and routers.
NAMES = ("opt-plain", "falcon-rw-alibi", "gemma2", "gemma3", "gpt-oss", "olmoe", "phi3-longrope",
         "qwen2-sliding")  # fmt: skip
GREEDY = {"temperature": 0, "stop_at_eos": False, "reuse": True}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    for name in NAMES:
        convert(DATA / name, folder / f"{name}.flash", "f32")
    return folder


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """(a model whose windowed layers keep 201 tokens, a text of 650, its logits by kv dtype)"""
    from flashinfer.synth import synthesize
    from flashinfer.synth.shapes import config_like

    path = tmp_path_factory.mktemp("long") / "x.flash"
    small = {
        "hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 200,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 700,
        "sliding_window": 9, "model_type": "qwen2", "use_sliding_window": True,
        "max_window_layers": 1,
    }  # fmt: skip
    synthesize(path, {**config_like("mistral-7b", 700), **small})
    ids = np.random.default_rng(3).integers(3, 700, 650)
    expected = {}
    for dtype in KV_DTYPES:
        with Model.open(path, context=700, kv_dtype=dtype) as model:
            expected[dtype] = model.logits(ids)
    return path, ids, expected


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_text_goes_on_with_the_same_bits(bundles, tmp_path_factory, data):
    """Stopped anywhere, of any architecture: the same tokens and logits, whatever the budget."""
    path = bundles / f"{data.draw(st.sampled_from(NAMES))}.flash"
    dtype, file = data.draw(st.sampled_from(KV_DTYPES)), tmp_path_factory.mktemp("s") / "x"
    prompt = np.random.default_rng(data.draw(st.integers(0, 99))).integers(3, 90, 9).tolist()
    stop = data.draw(st.integers(0, 10))
    options = {"context": 24, "kv_dtype": dtype}
    with Model.open(path, **options) as model:
        tokens = list(model.generate(prompt, 12, **GREEDY))
        logits = model.logits([*prompt, *tokens])
        model.reset()
        said = list(model.generate(prompt, stop, **GREEDY))
        model.save_session(file, prompt + said)
        assert said == tokens[:stop]
    threads, window = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([None, 2]))
    with Model.open(path, **options, threads=threads, window=window) as model:
        session = model.load_session(file)
        assert session.token_ids == prompt + said and session.messages == []
        assert session.kept == model.position == len(prompt) + max(0, stop - 1)
        rest = list(model.generate(session.token_ids, 12 - stop, **GREEDY))
        assert rest == tokens[stop:] and model.stats.prompt.tokens == 1
        session = model.load_session(file)
        text = [*prompt, *tokens]
        found = model.forward(text[session.kept :], every=True)
        assert np.array_equal(found, logits[session.kept :])


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 640), st.integers(0, 9), st.sampled_from(KV_DTYPES))
def test_what_windows_hold_is_enough(long_text, tmp_path_factory, stop, back, dtype):
    """Layers whose windows have moved: what they hold is saved, and takes no more than that."""
    path, ids, expected = long_text
    file = tmp_path_factory.mktemp("s") / "x"
    with Model.open(path, context=700, kv_dtype=dtype) as model:
        model.forward(ids[:stop])
        kept = max(0, stop - back)
        model.save_session(file, ids[: kept + 3])
    with Model.open(path, context=680, kv_dtype=dtype) as model:
        session = model.load_session(file)
        kept = min(stop, kept + 3)
        assert session.kept == model.position == kept
        found = model.forward(ids[kept : kept + 9], every=True)
        assert np.array_equal(found, expected[dtype][kept : kept + 9])
    held = safetensors.numpy.load_file(file)
    assert held["layers.0.keys"].shape[1] == kept
    assert held["layers.2.keys"].shape[1] <= min(kept, 9 + 64 + 128)


def test_a_text_that_layers_have_moved_past_is_saved_without_keys(long_text, tmp_path):
    path, ids, expected = long_text
    with Model.open(path, context=700) as model:
        model.forward(ids[:600])
        model.save_session(tmp_path / "x", ids[:300])
        session = model.load_session(tmp_path / "x")
        assert session.kept == model.position == 0 and len(session.token_ids) == 300
        found = model.forward(session.token_ids, every=True)
        assert np.array_equal(found, expected["f16"][:300])


def test_saving_disturbs_no_generation(tmp_path):
    messages = [{"role": "user", "content": "h\u00e9 \U0001f600\n"}]
    with Model.open(DEMO) as model:
        expected = list(model.generate([5, 6, 7], 9, **GREEDY))
        tokens = model.generate([5, 6, 7], 9, **GREEDY)
        said = []
        for token in tokens:
            said.append(token)
            model.save_session(tmp_path / "x", messages=messages)
        assert said == expected
        session = model.load_session(tmp_path / "x")
        assert session.token_ids == [5, 6, 7, *expected[:8]] and session.messages == messages
        with pytest.raises(UserError, match="token id 4096 is not within 0 to 4095"):
            model.save_session(tmp_path / "x", [4096])
        with pytest.raises(UserError, match="more than the model's positions"):
            model.save_session(tmp_path / "x", [5] * 5000)
        with pytest.raises(UserError, match=r"messages of .* bytes could not be read again"):
            model.save_session(tmp_path / "x", messages=[{"role": "user", "content": "é" * 2**21}])
        assert peek(tmp_path / "x", model.bundle) == session


# ---------------------------------------------------------------------- what does not fit


def test_other_settings_are_refused_with_what_would_be_right(bundles, tmp_path, monkeypatch):
    file, long = tmp_path / "x.session", bundles / "phi3-longrope.flash"
    with Model.open(DEMO, context=64) as model:
        model.forward(range(5, 45))
        model.save_session(file)
    for options, says in (
        ({"kv_dtype": "q8_0"}, "its keys and values are f16, .* --kv-dtype f16 goes on with it"),
        ({"neurons": "dense"}, "of the mode predicted, .* --neurons predicted goes on with it"),
        ({"context": 39}, "its 40 tokens do not fit the context of 39; -c 41 or more"),
    ):
        with Model.open(DEMO, **options) as model:
            model.forward([5, 6])
            with pytest.raises(UserError, match=says) as refused:
                model.load_session(file)
            assert str(refused.value).startswith(f"{file}: ") and model.ids == [5, 6]
    another = r"of another model, demo\.flash .*, not of .*opt-plain"
    with (
        Model.open(bundles / "opt-plain.flash") as model,
        pytest.raises(FormatError, match=another),
    ):
        model.load_session(file)
    if "native" in kernels.TWINS:
        monkeypatch.setattr(kernels, "in_use", "numpy")
        with (
            Model.open(DEMO, context=64) as model,
            pytest.raises(UserError, match="FLASHINFER_KERNELS=native in the environment"),
        ):
            model.load_session(file)
        monkeypatch.undo()
    with Model.open(long) as model:
        rotary = model.config.layers[0].attention.rotary.parameters
        original, most = rotary["original_max_position_embeddings"], model.plan.context
    assert original < most
    with Model.open(long, context=original) as model:
        model.forward([5, 6])
        model.save_session(file)
    with Model.open(long, context=original - 1) as model:
        assert model.load_session(file).kept == 2
    with (
        Model.open(long, context=original + 1) as model,
        pytest.raises(UserError, match=f"positions depend; -c {original} goes on with it"),
    ):
        model.load_session(file)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(bytes of a session of the demo model, logits of what follows it)."""
    file = tmp_path_factory.mktemp("stored") / "x"
    with Model.open(DEMO, context=32) as model:
        model.forward(range(5, 12))
        model.save_session(file, range(5, 14), [{"role": "user", "content": "Hello"}])
        return file.read_bytes(), model.forward([12, 13])


def refused_or_right(model, file, logits):
    """Whether a session is taken; then it gives the right logits, and else the model is sound."""
    try:
        session = model.load_session(file)
    except UserError as error:
        message = str(error)
        assert message.startswith(str(file)) and message.isprintable(), message
        assert model.position in (0, 2)
        model.reset()
        model.forward(range(5, 12))
        assert np.array_equal(model.forward([12, 13]), logits)
        model.reset(2)
        return False
    assert session.kept == model.position
    return True


def test_a_flipped_byte_or_a_cut_is_noticed_anywhere(stored, tmp_path):
    raw, logits = stored
    file, random = tmp_path / "x", np.random.default_rng(2)
    header = 8 + int.from_bytes(raw[:8], "little")
    places = {*range(8), *random.integers(8, header, 150), *random.integers(header, len(raw), 150)}
    with Model.open(DEMO, context=32) as model:
        for place in sorted(places):
            spoiled = bytearray(raw)
            spoiled[place] ^= 1 << int(random.integers(8))
            file.write_bytes(spoiled)
            assert not refused_or_right(model, file, logits), place
        for length in {0, 7, 8, header, len(raw) - 1, *random.integers(0, len(raw), 60)}:
            file.write_bytes(raw[:length])
            assert not refused_or_right(model, file, logits), length
        file.write_bytes(raw + b"x")
        assert not refused_or_right(model, file, logits)
        file.write_bytes(raw)
        assert refused_or_right(model, file, logits)
        assert np.array_equal(model.forward([12, 13]), logits)


def sealed(value, data):
    """A file with this header, whose own checksum is right."""
    text = json.dumps(value, separators=(",", ":")).encode()
    metadata = value.get("__metadata__") if isinstance(value, dict) else None
    stored = metadata.get("flashinfer.header_crc32") if isinstance(metadata, dict) else None
    if isinstance(stored, str) and stored:
        blank = text.replace(f'"{stored}"'.encode(), b'"00000000"', 1)
        text = blank.replace(b'"00000000"', f'"{zlib.crc32(blank):08x}"'.encode(), 1)
    return len(text).to_bytes(8, "little") + text + data


def test_hostile_headers_are_refused_in_one_line(stored, tmp_path):
    """Whose checksums are right, as of one who means it."""
    raw, logits = stored
    file, random = tmp_path / "x", np.random.default_rng(4)
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    file.write_bytes(sealed(header, data))
    taken = 0
    with Model.open(DEMO, context=32) as model:
        assert refused_or_right(model, file, logits)
        model.reset(2)
        for case in range(400):
            value = dict(header)
            if case % 4:
                metadata = {**header["__metadata__"]}
                key = ("flashinfer.state", "flashinfer.state", "flashinfer.checksums")[case % 3]
                metadata[key] = json.dumps(changed(json.loads(metadata[key]), random), default=str)
                value["__metadata__"] = metadata
            else:
                value = changed(value, random)
            try:
                file.write_bytes(sealed(value, data))
            except (TypeError, ValueError):  # no JSON
                continue
            taken += refused_or_right(model, file, logits)
            model.reset(min(2, model.position))
    assert taken < 200


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.update(kept=6), "layers.0.keys is .*, not"),
        (lambda s: s.update(kept=-1), "does not say soundly"),
        (lambda s: s.update(kept=40), "no text of this model|does not say soundly"),
        (lambda s: s.update(first=[0] * 5), "does not say soundly"),
        (lambda s: s.update(first=[1, 0, 0, 0, 0, 0]), "layer 0 cannot hold"),
        (lambda s: s["setting"].update(context=1 << 40), "does not say soundly"),
        (lambda s: s["setting"].update(kv_dtype="f64"), "its keys and values are f64"),
        (lambda s: s["setting"].pop("mode"), "does not say soundly"),
    ],
)
def test_states_that_fit_nothing(stored, tmp_path, change, says):
    raw, _ = stored
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    state = json.loads(header["__metadata__"]["flashinfer.state"])
    change(state)
    header["__metadata__"]["flashinfer.state"] = json.dumps(state)
    (tmp_path / "x").write_bytes(sealed(header, raw[8 + length :]))
    with Model.open(DEMO, context=32) as model, pytest.raises(UserError, match=says):
        model.load_session(tmp_path / "x")


# ---------------------------------------------------------------------- commands


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "flashinfer", *map(str, words)],
        capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def test_run_goes_on(cli, tmp_path):
    """With a longer prompt, with the text so far, and with ids where there is no tokenizer."""
    file, figures = tmp_path / "x.session", tmp_path / "x.json"
    ids = ",".join(map(str, range(5, 55)))
    whole = ("run", DEMO, "--tokens", ids, "-n", 24, "--temp", 0, "--ignore-eos")
    _, expected, _ = cli(*whole, "--json", figures)
    assert json.loads(figures.read_text())["session"] is None
    part = ("--temp", 0, "--ignore-eos", "--session", file, "--json", figures)
    code, _, err = cli("run", DEMO, "--tokens", ids, "-n", 10, *part)
    assert code == 0 and "0 of 50 tokens of the prompt were read back" in err
    first = json.loads(figures.read_text())
    assert first["session"]["stored_tokens"] == 0 and first["session"]["saved_tokens"] == 60
    code, _, err = cli("run", DEMO, "-n", 14, *part)
    assert code == 0 and "59 of 60 tokens of the prompt were read back" in err
    again = json.loads(figures.read_text())
    assert again["session"]["resumed_tokens"] == again["session"]["stored_tokens"] == 59
    tokens = first["token_ids"] + again["token_ids"]
    assert " ".join(map(str, tokens)) == expected.strip()
    code, _, err = cli("run", DEMO, "--tokens", ids + ",9", "-n", 2, *part)
    assert code == 0 and "50 of 51 tokens of the prompt" in err
    # What is refused leaves the session as it was.
    before = file.read_bytes()
    code, _, err = cli("run", DEMO, "--tokens", ids + ",9", "-n", 2, "-c", 40, *part)
    assert code == 1 and "-c 53 or more goes on with it" in err
    code, _, err = cli("run", DEMO, "--tokens", "4096", "-n", 2, *part)
    assert code == 1 and "token id 4096" in err and file.read_bytes() == before
    for words, says in (
        (("--session", DEMO), "is what is read"),
        (("--session", tmp_path), "is a directory"),
        (("--session", tmp_path / "none" / "x"), "cannot be written"),
    ):
        code, _, err = cli("run", DEMO, "--tokens", "5", "-n", 1, *words)
        assert code == 1 and says in err and err.count("\n") == 1
    (tmp_path / "text").write_text("a text of mine, of more than eight bytes")
    code, _, err = cli("run", DEMO, "--tokens", "5", "-n", 1, "--session", tmp_path / "text")
    assert code == 1 and "not a safetensors file" in err
    assert (tmp_path / "text").read_text().startswith("a text of mine")


def test_a_full_disk_leaves_the_old_session(tmp_path):
    file = tmp_path / "x.session"
    words = ("run", DEMO, "--tokens", "5,6,7", "-n", 2, "--temp", 0, "--session", file)
    assert command(*words).returncode == 0
    before, limit = file.read_bytes(), file.stat().st_size + 4096
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from flashinfer.__main__ import main; main()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "-n", "40", "--ignore-eos"],
        capture_output=True, text=True,
    )  # fmt: skip
    said = run.stderr.splitlines()[-1]
    assert run.returncode == 1 and said.startswith(f"flashinfer: error: {file}: "), run.stderr
    assert "Traceback" not in run.stderr and len(run.stdout.split()) == 40
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["x.session"]


def test_ctrl_c_keeps_the_text(tmp_path):
    file = tmp_path / "x.session"
    words = ("run", DEMO, "--tokens", "5,6,7", "--temp", "0", "--ignore-eos", "-c", "512")
    with subprocess.Popen(
        [sys.executable, "-m", "flashinfer", *words, "-n", "500", "--session", file],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    ) as running:  # fmt: skip
        assert running.stdout.read(20)  # the first token is written
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130 and b"Traceback" not in err
    with Model.open(DEMO) as model:
        session = model.load_session(file)
        assert session.token_ids[:3] == [5, 6, 7] and len(session.token_ids) > 3
        assert 0 < session.kept <= len(session.token_ids)
        rest = list(model.generate(session.token_ids, 5, **GREEDY))
        whole = list(model.generate([5, 6, 7], len(session.token_ids) + 2, temperature=0,
                                    stop_at_eos=False))  # fmt: skip
        assert [*session.token_ids[3:], *rest] == whole


def test_a_chat_goes_on(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")
    from test_chat import checkpoint

    path, file = tmp_path / "x.flash", tmp_path / "x.session"
    convert(checkpoint(tmp_path / "hf"), path, "f32")
    chat = ("chat", path, "-n", 8, "--temp", 0)
    lines = ["Hello", "What is that?", "And then?"]
    whole = command(*chat, "--system", "Be brief.", input="\n".join(lines))
    replies, said = [], ""
    for number, line in enumerate(lines):
        system = ("--system", "Be brief.") if number < 2 else ()
        run = command(*chat, *system, "--session", file, input=line + "\n")
        assert run.returncode == 0, run.stderr
        replies.append(run.stdout)
        said = run.stderr
    assert "".join(replies) == whole.stdout and f"({file}: 5 messages, " in said
    with Model.open(path, context=400) as model:
        session = peek(file, model.bundle)
    assert [one["role"] for one in session.messages] == ["system", *["user", "assistant"] * 3]
    assert [one["content"] for one in session.messages[1::2]] == lines
    run = command(*chat, "--system", "Be long.", "--session", file, input="Hello\n")
    assert run.returncode == 1 and "leave --system away" in run.stderr
    # The text goes on with run, which keeps the messages; /reset forgets them.
    run = command("run", path, "-n", 3, "--temp", 0, "--session", file)
    assert run.returncode == 0
    with Model.open(path, context=400) as model:
        assert peek(file, model.bundle).messages == session.messages
    run = command(*chat, "--session", file, input="/reset\n/exit\n")
    with Model.open(path, context=400) as model:
        assert [one["role"] for one in peek(file, model.bundle).messages] == ["system"]
