"""What our engine computes of a model of the kit: its logits, and the trace as summaries."""

from pathlib import Path

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float32Array, Int64Array
from flashinfer.formats.convert import convert
from flashinfer.model import Model
from flashinfer.oracle.kits.draws import VERSION, whole_numbers
from flashinfer.oracle.kits.safetensors_file import safetensors_bytes
from flashinfer.oracle.summary import Summaries
from flashinfer.oracle.trace import Recorder, wanted_values
from flashinfer.oracle.trace_file import trace_metadata
from flashinfer.transformer.values import Value

TOKENS = 40  # of each text; more than the windows and the original contexts of long positions
FIRST_TOKEN = 3  # those before are special
# No other engine records the largest scores, and no other value is computed from them.
LEFT_OUT = ("scores_max",)


class LogitsAndSummaries:
    """A Sink that keeps the logits (T, vocab_size) and a Summary of every value."""

    def __init__(self, summaries: Summaries, n_tokens: int, vocab_size: int) -> None:
        self.summaries = summaries
        self.logits: Float32Array = np.zeros((n_tokens, vocab_size), dtype=np.float32)

    def rows(self, value: Value, first: int, rows: AnyArray) -> None:
        """Take ``rows`` (n, ...) of a value, those from the row ``first`` on."""
        self.summaries.rows(value, first, rows)
        if value.key == "logits":
            self.logits[first : first + len(rows)] = rows


def tokens_of(name: str, vocab_size: int) -> Int64Array:
    """(TOKENS,) the text that a model of this name is run on."""
    return whole_numbers(f"{name} tokens", TOKENS, FIRST_TOKEN, vocab_size - 1)


def write_golden(source: Path, name: str, logits: Path, trace: Path, scratch: Path) -> None:
    """Run a checkpoint or a GGUF file, in float32, on the tokens of the model ``name``, and write
    its logits and its trace.

    scratch  a directory for the bundle, which is deleted
    """
    bundle = scratch / "kit.flash"
    convert(source, bundle, "f32")
    try:
        with Model.open(bundle, context=TOKENS, threads=1) as model:
            ids = tokens_of(name, model.config.vocab_size)
            values = [v for v in wanted_values(model) if v.key not in LEFT_OUT]
            sink = LogitsAndSummaries(Summaries(values, TOKENS), TOKENS, model.config.vocab_size)
            model.trace(ids, Recorder(values, np.arange(TOKENS), sink))
            engine = f"flashinfer kit {VERSION}"
            metadata = trace_metadata(
                engine, model.bundle.hf_config, ids, np.arange(TOKENS), model.plan.mode
            )
    finally:
        bundle.unlink()
    sink.summaries.write(trace, metadata)
    logits.write_bytes(safetensors_bytes({"logits": sink.logits, "tokens": ids}))
