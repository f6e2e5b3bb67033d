"""Fixtures of pytest that check another engine: see docs/oracle.md.

pytest loads this file in every run; what it needs is imported when a fixture is used.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest


class Oracle:
    """A model whose values are known.

    path  a bundle, a checkpoint's directory or a GGUF file
    """

    def __init__(self, path: Path | str, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.bundle: Path | None = None
        self.written = 0

    def values(self, tokens: Sequence[int], only: Sequence[str] = ()) -> dict[str, Any]:
        """{name: (T, ...)}: every intermediate value of a run of ``tokens``, of all neurons."""
        from flashinfer.model import Model
        from flashinfer.oracle.trace import trace

        with Model.open(self._flat(), neurons="dense", context=len(tokens)) as model:
            return trace(model, tokens, only=only)

    def conforms(self, trace: Path | str, arithmetic: str | None = None) -> Any:
        """The Comparison of another engine's trace with this model, or with a golden."""
        from flashinfer.oracle.arithmetic import arithmetic_named
        from flashinfer.oracle.compare import compare
        from flashinfer.oracle.golden import compare_with_golden
        from flashinfer.oracle.model_weights import ModelWeights
        from flashinfer.oracle.trace_file import Trace, is_trace

        if is_trace(self.path):
            with Trace(self.path) as golden, Trace(trace) as other:
                return compare_with_golden(golden, other)
        with ModelWeights(self.path) as weights, Trace(trace) as other:
            how = arithmetic_named(arithmetic) if arithmetic else other.how
            return compare(weights, other, how)

    def write(
        self,
        values: dict[str, Any],
        tokens: Sequence[int],
        engine: str = "the engine",
        arithmetic: str = "float32",
    ) -> Path:
        """Write another engine's values {name: (T, ...)} as a trace; returns its path."""
        from flashinfer.oracle.model_weights import ModelWeights
        from flashinfer.oracle.trace_file import write_trace
        from flashinfer.transformer.values import values_of

        self.written += 1
        path = self.folder / f"other{self.written}.safetensors"
        with ModelWeights(self.path) as weights:
            order = [v for v in values_of(weights.config, weights.naming) if v.name in values]
            strangers = values.keys() - {v.name for v in order}
            assert not strangers, f"no values of this model: {', '.join(sorted(strangers))}"
            write_trace(
                path, order, values, engine, weights.hf_config, tokens, arithmetic=arithmetic
            )
        return path

    def _flat(self) -> Path:
        """The model as a bundle."""
        from flashinfer.formats.convert import convert
        from flashinfer.formats.sources.gguf import is_gguf

        if self.bundle is None:
            self.bundle = Path(self.path)
            if self.bundle.is_dir() or is_gguf(self.path):
                self.bundle = self.folder / "oracle.flash"
                convert(self.path, self.bundle, "f32")
        return self.bundle


@pytest.fixture
def oracle(tmp_path: Path) -> Callable[[Path | str], Oracle]:
    """A function that opens a model as an Oracle."""
    return lambda path: Oracle(path, tmp_path)


@pytest.fixture
def assert_conforms(tmp_path: Path) -> Callable[..., None]:
    """A function (trace, model, arithmetic=None) that fails the test where the engine that wrote
    ``trace`` does not conform, with the first operation that is wrong."""

    def check(trace: Path | str, model: Path | str, arithmetic: str | None = None) -> None:
        from flashinfer.oracle.report import lines, page

        found = Oracle(model, tmp_path).conforms(trace, arithmetic)
        if found.first is not None:
            report = tmp_path / "comparison.html"
            report.write_text(page(found), encoding="utf-8")
            pytest.fail("\n".join([*lines(found), f"report: {report}"]), pytrace=False)

    return check
