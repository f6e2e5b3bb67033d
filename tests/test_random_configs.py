"""Random configs against transformers: the same logits, or a refusal that says which field.

python tests/test_random_configs.py [--count 2000] [--seed 0] [--type gemma3_text]
"""

import argparse
import json
import os
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from random_configs import ENCODERS, MODEL_TYPES, TOKENS, random_config

from flashinfer import Model
from flashinfer.formats.architectures import ARCHITECTURES, model_config
from flashinfer.formats.convert import convert
from flashinfer.formats.errors import FormatError, UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
MOST = 1e-4  # of the largest logit
COMPARED, REFUSED, NOT_THEIRS, WRONG = "compared", "refused", "transformers refuses", "WRONG"


@dataclass
class Outcome:
    model_type: str
    what: str  # one of the four
    reason: str = ""


def try_config(seed, number, model_type=None):
    """The Outcome of one config, which ``seed`` and ``number`` name."""
    random = np.random.default_rng([seed, number])
    model_type = model_type or MODEL_TYPES[number % len(MODEL_TYPES)]
    config = random_config(random, model_type)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        (Path(folder) / "config.json").write_text(json.dumps(config))
        warnings.simplefilter("ignore")
        theirs = their_logits(folder, random)
        warnings.simplefilter("error")
        if isinstance(theirs, str):
            try:
                model_config(config)
            except FormatError:
                pass
            return Outcome(model_type, NOT_THEIRS, theirs)
        ids, theirs = theirs
        try:
            convert(folder, Path(folder) / "x.flash", "f32")
            with Model.open(Path(folder) / "x.flash", context=TOKENS) as model:
                ours = encoded(model, ids) if model.config.encoder else model.logits(ids)
        except UserError as error:
            return Outcome(model_type, REFUSED, str(error).replace(folder, ""))
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if difference < MOST:
        return Outcome(model_type, COMPARED)
    return Outcome(model_type, WRONG, f"seed {seed}, number {number}, {difference:.1e}: {config}")


def encoded(model, ids):
    """What an encoder gives of a text, one behind the other."""
    found = model.encode([ids], logits=model.config.has_head)[0]
    parts = (found.hidden, found.pooled, found.logits)
    return np.concatenate([part.reshape(-1) for part in parts if part is not None])


def their_encoding(model, ids):
    """The same by a model of transformers."""
    text = torch.tensor(ids)[None]
    output = getattr(model, model.base_model_prefix, model)(text)
    parts = [output.last_hidden_state, output.pooler_output]
    parts.append(model(text).logits if hasattr(model, model.base_model_prefix) else None)
    return np.concatenate([part.numpy().reshape(-1) for part in parts if part is not None])


def their_logits(folder, random):
    """A random checkpoint for the config in ``folder``, and what transformers makes of it: (ids,
    logits), or why it makes nothing of it."""
    text = (Path(folder) / "config.json").read_text()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind, is_encoder = transformers.AutoModelForCausalLM, config.model_type in ENCODERS
        if is_encoder:
            headed = random.integers(2)
            kind = transformers.AutoModelForMaskedLM if headed else transformers.AutoModel
        model = kind.from_config(config)
        randomise(model, int(random.integers(1 << 30)))
        saved_as(random, model, folder)
        (Path(folder) / "config.json").write_text(text)
        # Of Falcon's two ways "eager" adds alibi twice.
        attention = "sdpa" if config.model_type == "falcon" and config.alibi else "eager"
        model = kind.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention,
            experts_implementation="eager",
        ).eval()  # fmt: skip
        ids = random.integers(3, config.vocab_size, TOKENS)
        with torch.no_grad():
            if is_encoder:
                logits = their_encoding(model, ids)
            else:
                # Its caches count tokens in layers with attention, which some models have none of.
                logits = model(torch.tensor(ids)[None], use_cache=False).logits[0].numpy()
    except Exception as error:  # whatever it is, the config is not one of theirs
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"
    if not np.isfinite(logits).all():
        return "its logits are not finite"
    return ids, logits


@torch.no_grad()
def randomise(model, seed):
    """Weights so large that every option makes a difference, norms and biases too; of wide rows
    smaller ones, as a difference of rounding would grow with each layer."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, max(0.1, min(0.2, 1.3 * parameter.shape[-1] ** -0.5)))
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    for module in model.modules():
        weigh_queries(module)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # which comes with a checkpoint, as weights do
            buffer.normal_(0, 0.3)
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)


def weigh_queries(module):
    """Of attention without a scale the norm of queries has it: else a few keys would take all, and
    differences of rounding would grow with each layer."""
    if getattr(module, "scaling", None) == 1.0 and hasattr(module, "q_norm"):
        module.q_norm.weight.mul_(module.head_dim**-0.5)


def saved_as(random, model, folder):
    """As safetensors in one of their forms, sharded or not, or as PyTorch's own files."""
    form = random.integers(6)
    if form == 0:
        named = {*dict(model.named_parameters()), *dict(model.named_buffers())}
        weights = {name: w for name, w in model.state_dict().items() if name in named}
        torch.save(weights, Path(folder) / "pytorch_model.bin")
        return
    options = {1: {"save_original_format": False}, 2: {"max_shard_size": "20KB"}}.get(form, {})
    dtype = {3: torch.bfloat16, 4: torch.float64}.get(form, torch.float32)
    model.to(dtype).save_pretrained(folder, **options)


def run(count, seed, model_type=None, report=None):
    """[Outcome]; report is called with each."""
    quiet()
    outcomes = []
    for number in range(count):
        outcomes.append(try_config(seed, number, model_type))
        if report:
            report(outcomes[-1])
    return outcomes


def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def test_configs_give_the_same_logits_or_are_refused():
    seed = int(os.environ.get("FUZZ_SEED", 7))  # the same at each run
    outcomes = run(6 * len(MODEL_TYPES), seed)
    assert [o.reason for o in outcomes if o.what == WRONG] == []
    compared = Counter(o.model_type for o in outcomes if o.what == COMPARED)
    assert compared.total() >= 0.6 * len(outcomes), f"seed {seed}"
    assert compared.keys() == set(MODEL_TYPES), f"seed {seed}"


WRONG_DEFAULTS = [
    ("mixtral", "rope_theta", 10000.0),
    ("gemma2", "attn_logit_softcapping", None),
    ("gemma3_text", "sliding_window_pattern", 2),
    ("qwen2", "sliding_window", 3),
    ("gpt_oss", "swiglu_limit", 0.5),
    ("phi", "hidden_act", "relu"),
    ("olmoe", "norm_topk_prob", True),
    ("nemotron", "norm_eps", 1.0),
    ("dots1", "routed_scaling_factor", 2.0),
    ("glm4_moe", "routed_scaling_factor", 2.0),
    ("glm4_moe", "partial_rotary_factor", 1.0),
    ("gpt_neox", "rotary_pct", 0.5),
    ("gpt_neox", "use_parallel_residual", False),
    ("smollm3", "no_rope_layer_interval", 2),
    ("ministral3", "rope_theta", 1000000.0),
    ("olmo3", "rope_theta", 10000.0),
    ("flex_olmo", "rope_theta", 10000.0),
    ("hunyuan_v1_moe", "rope_theta", 100.0),
    ("phimoe", "router_jitter_noise", 0.3),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("granite", "attention_multiplier", 0.5),
    ("ernie4_5", "rope_theta", 10000.0),
    ("ernie4_5_moe", "moe_k", 2),
    ("nanochat", "final_logit_softcapping", None),
    ("bitnet", "rms_norm_eps", 0.1),
    ("deepseek_v2", "routed_scaling_factor", 2.0),
    ("deepseek_v3", "rope_interleave", False),
    ("glm4_moe_lite", "latent_norm_eps", 0.1),
    ("gemma3n_text", "altup_active_idx", 1),
    ("gemma4_text", "sliding_window", 3),
    ("gemma4_text", "final_logit_softcapping", 1.0),
]


@pytest.mark.parametrize("model_type, field, wrong", WRONG_DEFAULTS)
def test_a_wrong_default_is_found(model_type, field, wrong, monkeypatch):
    """The comparison above sees what it should."""
    monkeypatch.setitem(ARCHITECTURES[model_type].DEFAULTS, field, wrong)
    quiet()
    assert any(try_config(1, n, model_type).what == WRONG for n in range(20))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--type", choices=MODEL_TYPES, help="of one architecture only")
    args = parser.parse_args()

    def report(outcome):
        if outcome.what == WRONG:
            print(outcome.model_type, outcome.reason, flush=True)

    outcomes = run(args.count, args.seed, args.type, report)
    kinds = (COMPARED, REFUSED, NOT_THEIRS, WRONG)
    print("| architecture |", " | ".join(kinds), "|\n|---|---|---|---|---|")
    for model_type in (*MODEL_TYPES, "all"):
        found = Counter(o.what for o in outcomes if model_type in (o.model_type, "all"))
        print(f"| {model_type} |", " | ".join(str(found[kind]) for kind in kinds), "|")
    for kind in (REFUSED, NOT_THEIRS):
        reasons = defaultdict(set)
        for outcome in outcomes:
            if outcome.what == kind:
                reasons[outcome.reason].add(outcome.model_type)
        print(f"\n{kind}:")
        for reason, types in sorted(reasons.items()):
            print(f"  {reason} ({', '.join(sorted(types))})")
    sys.exit(any(o.what == WRONG for o in outcomes))


if __name__ == "__main__":
    main()
