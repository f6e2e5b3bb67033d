"""How few neurons a token uses: by layer, by kind of text, and how unevenly they fire."""

from dataclasses import dataclass

import numpy as np

from flashinfer.study.activity import Sample, Study, activity
from flashinfer.study.findings import Chart, Finding, Point, Table, percent

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of the units, the hottest first
TENTH = SHARES.index(0.1)


@dataclass(frozen=True)
class _Text:
    """What a text used.

    units, tokens  of the model, and of the text
    layers  (layer, share of its units that a token uses)
    heat    (share of the units, the hottest first; share of all uses that they account for)
    never   share of the units that no token used
    """

    name: str
    units: int
    tokens: int
    layers: list[Point]
    heat: list[Point]
    never: float

    @property
    def shares(self) -> list[float]:
        return [share for _, share in self.layers]

    @property
    def mean(self) -> float:
        return float(np.mean(self.shares))


def run(study: Study) -> Finding:
    """The Finding of all texts of a study."""
    texts = [_text(study, sample) for sample in study.samples]
    first, *others = texts
    answer = [
        f"Of {first.units:,} units a token of {first.name} uses {percent(first.mean)} on average, "
        f"{percent(min(first.shares))} in the sparsest layer and {percent(max(first.shares))} in "
        "the densest.",
        f"The tenth of the units that fires most accounts for {percent(first.heat[TENTH][1])} of "
        f"all uses; {percent(first.never)} of the units are not used in {first.tokens:,} tokens.",
    ]
    if others:
        said = "; ".join(f"{text.name} {percent(text.mean)}" for text in others)
        answer.append(f"Other texts: {said}.")
    table = Table(
        "Share of the units that a token uses",
        ["text", "tokens", "mean", "least layer", "most layer", "never used",
         "uses by the hottest tenth"],
        [
            [text.name, text.tokens, text.mean, min(text.shares), max(text.shares), text.never,
             text.heat[TENTH][1]]
            for text in texts
        ],
    )  # fmt: skip
    return Finding(
        "sparsity",
        "Sparsity: how few neurons a token uses",
        "How many neurons of a layer fire for a token, does that depend on the text, and are they "
        "always the same ones?",
        "Section 3.1, figure 4a: of OPT-6.7B's neurons 97 % are silent.",
        answer,
        [table],
        [
            Chart("Units that a token uses, by layer", "layer", "share of the layer's units",
                  {text.name: text.layers for text in texts}),
            Chart("Hot and cold units: the share of all uses that the hottest ones account for",
                  "share of the units, the hottest first", "share of the uses",
                  {text.name: text.heat for text in texts}),
        ],
    )  # fmt: skip


def _text(study: Study, sample: Sample) -> _Text:
    """What a text used."""
    layers: list[Point] = []
    counts = []
    for number, layer in enumerate(activity(study, sample, "sparsity")):
        layers.append((float(number), layer.share))
        counts.append(np.sort(layer.counts())[::-1])
    heat = [(share, float(np.mean([_covered(each, share) for each in counts])))
            for share in SHARES]  # fmt: skip
    units = sum(len(each) for each in counts)
    never = sum(int(np.count_nonzero(each == 0)) for each in counts) / units
    return _Text(sample.name, units, len(sample.ids), layers, heat, never)


def _covered(descending: np.ndarray, share: float) -> float:
    """The share of all uses that the first ``share`` of the units account for."""
    n = max(1, round(share * len(descending)))
    return float(descending[:n].sum() / max(1, descending.sum()))
