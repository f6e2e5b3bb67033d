"""How far logits are from transformers', for every architecture and option.

    python tests/parity_table.py [--check docs/architectures.md]

Makes a small random checkpoint of each kind, converts it to f32 and compares 40 tokens' logits; of
encoders their hidden states and pooled vectors, too.
Prints the table; exit code 1 where a difference is 1e-4 or more or, with --check, where a row is
missing from that file. Needs the ``parity`` extra.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from make_checkpoints import (
    ENCODER,
    ENCODERS,
    TOKENS,
    VARIANTS,
    allowed,
    encoded,
    make,
    reference,
    save,
)

from flashinfer import Model
from flashinfer.formats.convert import convert
from flashinfer.oracle.kits.configs import COMMON, GPT2, LATENT, LLAMA, OPT

MOST = 1e-4
LATENT_TYPES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")


def difference(options, seed=1):
    """Largest absolute difference of a logit, and what is allowed."""
    with TemporaryDirectory() as folder:
        model = make(options, seed)
        save(model, folder, options)
        path = Path(folder) / "x.flash"
        convert(folder, path, "f32")
        ids = np.random.default_rng(seed).integers(3, COMMON["vocab_size"], TOKENS)
        with Model.open(path, context=TOKENS) as ours:
            theirs = reference(model, ids)
            return float(np.abs(ours.logits(ids) - theirs).max()), allowed(model, theirs)


def difference_of_encoder(options, kind, seed=1):
    """Largest absolute difference of a number of a hidden state, a pooled vector or a logit."""
    with TemporaryDirectory() as folder:
        model = make(options, seed, kind=kind)
        save(model, folder, options)
        path = Path(folder) / "x.flash"
        convert(folder, path, "f32")
        ids = np.random.default_rng(seed).integers(0, COMMON["vocab_size"], TOKENS)
        with Model.open(path) as ours:
            found = ours.encode([ids], logits=ours.config.has_head)[0]
        theirs = encoded(model, ids)
        return max(
            float(np.abs(getattr(found, part) - values).max()) for part, values in theirs.items()
        )


def describe_encoder(options, kind):
    """The class of the model, and the options that are not those of every encoder here."""
    own = {key: value for key, value in options.items() if ENCODER.get(key) != value}
    del own["model_type"]
    head = kind.__name__.removeprefix("AutoModel") or "Model"
    return ", ".join([head, *(f"{key}={value}" for key, value in own.items())])


def describe(options):
    """The options that are not those of every test model, in a few words."""
    words = []
    for key, value in options.items():
        if key == "word_embed_proj_dim" and value == options["hidden_size"]:
            continue
        if options["model_type"] in LATENT_TYPES and LATENT.get(key) == value:
            continue
        if key in {*COMMON, *LLAMA, *OPT, *GPT2} - {"word_embed_proj_dim"}:
            continue
        if key == "rope_parameters":
            kind = value.get("rope_type", "of two kinds")
            words.append(f"rope {kind}" + (", mscale" if "mscale" in value else ""))
        elif key not in ("ffn_hidden_size", "head_dim", "original_max_position_embeddings"):
            words.append(key if value is True else f"{key}={value}")
    return ", ".join(words) or "as it is"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path, metavar="FILE", help="a file that has the table")
    args = parser.parse_args()
    text = args.check.read_text() if args.check else None
    print("| architecture | options | largest difference |\n|---|---|---|")
    failed = False
    for options in VARIANTS.values():
        row, (found, most) = (
            f"| {options['model_type']} | {describe(options)} |",
            difference(options),
        )
        print(f"{row} {found:.1e} |", flush=True)
        failed |= not found < most or (text is not None and row not in text)
    for options, kind in ENCODERS.values():
        row = f"| {options['model_type']} | {describe_encoder(options, kind)} |"
        found = difference_of_encoder(options, kind)
        print(f"{row} {found:.1e} |", flush=True)
        failed |= not found < MOST or (text is not None and row not in text)
    if failed:
        sys.exit("a difference is too large, or a row is missing")


if __name__ == "__main__":
    main()
