"""Traces of other engines: transformers, llama.cpp, and any whose arrays lie in a file."""

import fnmatch
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import DATA
from flashinfer import Model, UserError
from flashinfer.formats.convert import convert
from flashinfer.oracle.arithmetic import KNOWN
from flashinfer.oracle.by_hand import ArrayFile, NameMap, import_trace
from flashinfer.oracle.compare import compare
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.trace import trace
from flashinfer.oracle.trace_file import Trace

IDS = [(i * 37 + 11) % 90 + 3 for i in range(16)]
FOREIGN = [
    "opt-plain", "llama-yarn", "gemma3", "phi-qk-norm", "phi3", "falcon-new", "qwen2-moe-dense",
    "dots1", "granitemoe", "gpt-oss", "gpt-neox", "gpt-neox-in-turn",
    "gpt2", "gpt2-scaled", "smollm3", "ministral3", "olmo3", "flex-olmo", "hunyuan-alpha",
    "hunyuan-moe", "ernie4-5", "ernie4-5-moe", "nanochat", "bitnet", "phimoe", "granite-hybrid",
    "granite-hybrid-dense", "granite-hybrid-rope", "deepseek-v2", "deepseek-v2-lite",
    "deepseek-v3", "deepseek-v3-halves", "glm4-moe-lite", "lfm2", "nemotron-h", "nemotron-h-moe",
    "gemma4", "gemma4-shared", "gemma4-moe", "gemma3n", "gemma3n-other-state",
]  # fmt: skip
OF_GGUF = [
    "llama-silu", "qwen2", "qwen3", "gemma", "phi", "olmoe", "qwen2-moe", "qwen3-moe", "granitemoe",
    "gpt2", "arcee", "gemma2", "gemma3", "glm4-moe", "granite", "smollm3", "ministral3", "olmo2",
    "olmo3", "granite-hybrid", "granite-hybrid-rope", "deepseek-v2-lite", "deepseek-v3", "gemma4",
    "gemma4-moe",
]  # fmt: skip


def judged(model, path):
    with ModelWeights(model) as weights, Trace(path) as found:
        return compare(weights, found, KNOWN[found.arithmetic])


@pytest.mark.parametrize("name", FOREIGN)
def test_transformers_conforms(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from flashinfer.oracle.from_transformers import trace_transformers

    trace_transformers(DATA / name, IDS, tmp_path / "t.safetensors")
    found = judged(DATA / name, tmp_path / "t.safetensors")
    assert found.first is None and found.judged > 10


ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
FAULTS = [  # an attribute that is another one, and the value that is wrong then
    ("nanochat", f"{ATTENTION}.k_norm", "eps", lambda eps: 1e-2, f"{ATTENTION}.k_norm"),
    ("nanochat", "model.rotary_emb", "inv_freq", lambda f: 1.01 * f, "model.layers.0.*q_norm"),
    ("bitnet", f"{ATTENTION}.attn_sub_norm", "variance_epsilon", lambda eps: 1e-2,
     f"{ATTENTION}.attn_sub_norm"),
    ("bitnet", f"{MLP}.ffn_sub_norm", "forward", lambda norm: lambda x: x, f"{MLP}.ffn_sub_norm"),
    ("ernie4-5", "model.rotary_emb", "inv_freq", lambda f: 1.01 * f, "model.layers.0.*q_turned"),
    ("ernie4-5-moe", f"{MLP}.gate", "moe_statics", lambda bias: lambda scores: scores,
     f"{MLP}.gate.choices"),
    *(("granite-hybrid-dense", "model.layers.0.mamba", part, lambda p: type(p)(1.02 * p),
       "model.layers.0.mamba.norm.input") for part in ("D", "A_log", "dt_bias")),
    ("granite-hybrid-dense", "model.layers.0.mamba.norm", "group_size", lambda n: 2 * n,
     "model.layers.0.mamba.norm"),
    ("deepseek-v3", f"{ATTENTION}.kv_a_layernorm", "variance_epsilon", lambda eps: 1e-2,
     f"{ATTENTION}.kv_a_layernorm"),
    ("deepseek-v2", f"{ATTENTION}.q_a_layernorm", "variance_epsilon", lambda eps: 1e-2,
     f"{ATTENTION}.q_a_layernorm"),
    ("deepseek-v3", ATTENTION, "scaling", lambda scale: 1.01 * scale, f"{ATTENTION}.o_proj.input"),
    ("gemma4-shared", f"{ATTENTION}.v_norm", "eps", lambda eps: 1e-2, f"{ATTENTION}.v_norm"),
    ("gemma4-shared", "model.per_layer_projection_norm", "eps", lambda eps: 1e-1,
     "model.layers.0.per_layer_projection.input"),
    ("gemma4-shared", "model.layers.1", "layer_scalar", lambda scale: 1.01 * scale,
     "model.layers.1"),
    ("gemma4-moe", "model.layers.1.router", "per_expert_scale", lambda p: type(p)(1.02 * p),
     "model.layers.1.router.weights"),
    ("gemma3n", "model.layers.1.altup", "router_input_scale", lambda scale: 1.1 * scale,
     "model.layers.1.input_layernorm.input"),
    ("gemma3n", "model.layers.2.mlp", "activation_sparsity", lambda share: 0.61,
     "model.layers.2.mlp.down_proj.input"),
    ("gemma3n", "model.layers.1.altup", "correct_output_scale", lambda p: type(p)(1.02 * p),
     "model.layers.1.per_layer_input_gate.input"),
    ("deepseek-v2-lite", "model.rotary_emb", "inv_freq", lambda f: 1.01 * f,
     "model.layers.0.*o_proj.input"),
]  # fmt: skip


@pytest.mark.parametrize("name, module, attribute, changed, where", FAULTS)
def test_a_fault_of_transformers_is_found_where_it_is(
    name, module, attribute, changed, where, tmp_path
):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from flashinfer.oracle.from_transformers import traced_transformers

    config = json.loads((DATA / name / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / name).eval()
    faulty = model.get_submodule(module)
    wrong = changed(getattr(faulty, attribute))
    if attribute == "moe_statics":
        del faulty.moe_statics  # a module, whose place a function cannot take
    setattr(faulty, attribute, wrong)
    with torch.no_grad(), traced_transformers(model, IDS, tmp_path / "t.safetensors", config):
        model(torch.tensor([IDS]), use_cache=False)
    first = judged(DATA / name, tmp_path / "t.safetensors").first
    assert first is not None and fnmatch.fnmatchcase(first.name, where)


@pytest.mark.parametrize("name", ["llama-silu", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_in_16_bits_conforms(name, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from flashinfer.oracle.from_transformers import traced_transformers

    config = json.loads((DATA / name / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        DATA / name, dtype=getattr(torch, dtype)
    ).eval()
    model.save_pretrained(tmp_path / "rounded")
    with torch.no_grad(), traced_transformers(model, IDS, tmp_path / "t.safetensors", config):
        model(torch.tensor([IDS]), use_cache=False)
    with ModelWeights(tmp_path / "rounded") as weights, Trace(tmp_path / "t.safetensors") as found:
        assert compare(weights, found, KNOWN[dtype]).first is None
        assert compare(weights, found, KNOWN["float32"]).first is not None


@pytest.mark.parametrize("name", OF_GGUF)
def test_llama_cpp_conforms(name, tmp_path):
    pytest.importorskip("llama_cpp")
    gguf = pytest.importorskip("gguf")
    from flashinfer.oracle.from_llama_cpp import trace_llama_cpp
    from make_gguf import checkpoint_of, write_gguf

    def in_16_bits(name, values):
        exact = ("bias", "gate_inp", "ssm_a", "ssm_conv1d", "ssm_d", "ssm_norm")
        plain = any(part in name for part in exact)
        return None if plain else gguf.GGMLQuantizationType.F16

    def vocabulary(writer):
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(96)

    path = write_gguf(checkpoint_of(name, tmp_path), tmp_path / "x.gguf", in_16_bits, vocabulary)
    trace_llama_cpp(path, IDS, tmp_path / "t.safetensors")
    found = judged(path, tmp_path / "t.safetensors")
    assert found.first is None and found.judged > 10


def test_arrays_with_a_map(tmp_path):
    convert(DATA / "llama-silu", tmp_path / "x.flash", "f32")
    with Model.open(tmp_path / "x.flash") as model:
        ours = trace(model, IDS)
    theirs = {
        f"blk{layer}/{part}": ours[f"model.layers.{layer}.{name}"].reshape(len(IDS), -1)
        for layer in range(2)
        for part, name in (("q", "self_attn.q_proj"), ("ffn", "mlp.down_proj"))
    }
    np.savez(tmp_path / "run.npz", out=ours["logits"], scratch=np.zeros(3), **theirs)
    (tmp_path / "names.toml").write_text(
        f'engine = "mine"\ntokens = {IDS}\n[names]\n'
        '"blk{}/q" = "model.layers.{}.self_attn.q_proj"\n'
        '"blk{}/ffn" = "model.layers.{}.mlp.down_proj"\n"out" = "logits"\n'
    )
    with ModelWeights(DATA / "llama-silu") as weights:
        names = NameMap(tmp_path / "names.toml")
        left_out = import_trace(tmp_path / "run.npz", weights, tmp_path / "t.safetensors", names)
    assert left_out == ["scratch"]
    found = judged(DATA / "llama-silu", tmp_path / "t.safetensors")
    assert found.engine == "mine" and found.first is None and found.judged == 5


def test_arrays_of_npy_and_safetensors(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "logits.npy", array)
    with ArrayFile(tmp_path / "logits.npy") as arrays:
        assert np.array_equal(arrays.read("logits", 24), array)
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"a": array}, tmp_path / "x.safetensors")
    with ArrayFile(tmp_path / "x.safetensors") as arrays:
        assert np.array_equal(arrays.read("a", 24), array)


def test_tokens_are_needed(tmp_path):
    np.savez(tmp_path / "run.npz", logits=np.zeros((2, 96)))
    with (
        ModelWeights(DATA / "llama-silu") as weights,
        pytest.raises(UserError, match="give the text's token ids"),
    ):
        import_trace(tmp_path / "run.npz", weights, tmp_path / "t.safetensors")


def test_the_example_in_c(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = DATA.parents[1] / "docs" / "examples" / "write_trace.c"
    subprocess.run([compiler, "-o", tmp_path / "write_trace", source], check=True)
    subprocess.run([tmp_path / "write_trace", tmp_path / "x.safetensors"], check=True)
    with Trace(tmp_path / "x.safetensors") as found:
        assert found.engine == "an engine in C" and found.tokens.tolist() == [2, 0, 1]
        assert found.read("logits").shape == (3, 4)


def test_the_plugin_is_found_and_names_the_operation(tmp_path):
    """pytest, in a process of its own, has the fixtures without any set-up."""
    convert(DATA / "qwen2", tmp_path / "x.flash", "f32")
    (tmp_path / "test_mine.py").write_text(
        "import numpy as np\n"
        f"MODEL, TOKENS = {str(tmp_path / 'x.flash')!r}, {IDS}\n"
        "def test_sound(oracle, assert_conforms):\n"
        "    mine = oracle(MODEL)\n"
        "    assert_conforms(mine.write(mine.values(TOKENS), TOKENS), MODEL)\n"
        "def test_wrong(oracle, assert_conforms):\n"
        "    mine = oracle(MODEL)\n"
        "    values = mine.values(TOKENS)\n"
        "    values['model.layers.1.mlp.up_proj'][3, 4] += 0.5\n"
        "    assert_conforms(mine.write(values, TOKENS), MODEL)\n"
    )
    options = ["-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "the first wrong operation is model.layers.1.mlp.up_proj" in done.stdout


def test_the_commands(cli, tmp_path):
    model, path = DATA / "llama-silu", tmp_path / "t.safetensors"
    convert(model, tmp_path / "x.flash", "f32")
    ids = ",".join(map(str, IDS))
    assert cli("trace", tmp_path / "x.flash", "--tokens", ids, "-o", path)[0] == 0
    page, xml, figures = (tmp_path / name for name in ("c.html", "c.xml", "c.json"))
    code, out, _ = cli("compare", model, path, "--html", page, "--junit", xml, "--json", figures)
    assert code == 0 and "conforms" in out
    assert json.loads(figures.read_text())["conforms"] is True
    assert "<svg" in page.read_text() and "<testsuite" in xml.read_text()
    other = tmp_path / "other.safetensors"
    assert cli("trace", tmp_path / "x.flash", "--tokens", "5,6", "-o", other)[0] == 0
    assert cli("compare", path, path)[:2] == (0, "the bits are the same\n")
    code, _, err = cli("compare", path, other)
    assert code == 1 and "is a trace of other tokens" in err
    code, _, err = cli("compare", DATA / "opt-plain", path)
    assert code == 1 and "a trace of another model" in err
