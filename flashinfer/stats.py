"""What a generation took: the figures that ``run`` prints and ``Model.stats`` holds."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from flashinfer.formats.bundle.calibration import Sparsity
from flashinfer.generation.speculation import Drafted
from flashinfer.plan.cost import Cost
from flashinfer.plan.memory import peak_rss
from flashinfer.plan.plan import Plan


@dataclass
class Phase:
    """Sums over the tokens of the prompt, or of the generation."""

    tokens: int = 0
    seconds: float = 0.0
    flash_bytes: int = 0
    streamed_bytes: int = 0  # of these, in large sequential reads
    reads: int = 0  # in which the others came
    hits: int = 0
    misses: int = 0

    def add(
        self,
        tokens: int,
        seconds: float,
        flash_bytes: int,
        streamed_bytes: int,
        reads: int,
        hits: int,
        misses: int,
    ) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.flash_bytes += flash_bytes
        self.streamed_bytes += streamed_bytes
        self.reads += reads
        self.hits += hits
        self.misses += misses

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.flash_bytes / self.tokens if self.tokens else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the neurons used that were in DRAM; 1 where none was looked up."""
        looked_up = self.hits + self.misses
        return self.hits / looked_up if looked_up else 1.0


@contextmanager
def measured(
    phase: Phase, n_tokens: int, counters: Callable[[], tuple[int, ...]]
) -> Iterator[None]:
    """Add to a Phase what a block takes, if it succeeds; counters() gives add's other terms."""
    before, begun = counters(), time.perf_counter()
    yield
    seconds = time.perf_counter() - begun
    changes = (now - then for now, then in zip(counters(), before, strict=True))
    phase.add(n_tokens, seconds, *changes)


@dataclass
class Stats:
    """Of one generation; ``expected``: what the cost model says of a token.

    ``generation`` counts the tokens that were processed to yield others, drafts that were wrong
    left out: one fewer than were generated, since the last is not processed.
    """

    plan: Plan
    expected: Cost | None = None
    prompt: Phase = field(default_factory=Phase)
    generation: Phase = field(default_factory=Phase)
    drafts: Drafted = field(default_factory=Drafted)
    token_ids: list[int] = field(default_factory=list)
    sparsity: Sparsity | None = None  # of thresholds that are in force

    def as_dict(self) -> dict[str, Any]:
        """The figures under the keys of ``run --json``."""
        return {
            "prompt_tokens": self.prompt.tokens,
            "generated_tokens": len(self.token_ids),
            "prompt_tokens_per_second": self.prompt.tokens_per_second,
            "tokens_per_second": self.generation.tokens_per_second,
            "flash_bytes_per_token": self.generation.bytes_per_token,
            "streamed_bytes_per_token": self.generation.streamed_bytes
            / max(1, self.generation.tokens),
            "reads_per_token": self.generation.reads / max(1, self.generation.tokens),
            "passes": self.drafts.passes,
            "drafted_tokens": self.drafts.drafted,
            "accepted_tokens": self.drafts.accepted,
            "prompt_flash_bytes_per_token": self.prompt.bytes_per_token,
            "cache_hit_rate": self.generation.hit_rate,
            "peak_rss_bytes": peak_rss(),
            "token_ids": list(self.token_ids),
            "memory_budget_bytes": self.plan.budget,
            "window": self.plan.window or self.plan.affords,
            "cache": self.plan.policy,
            "context": self.plan.context,
            "kv_dtype": self.plan.kv_dtype,
            "neurons": self.plan.mode,
            "sparsity": self.sparsity and asdict(self.sparsity),
            "expected_tokens_per_second": self.expected and self.expected.tokens_per_second,
            "expected_flash_bytes_per_token": self.expected and self.expected.bytes,
        }
