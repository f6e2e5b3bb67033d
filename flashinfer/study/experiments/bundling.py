"""What bundling saves for models of any shape: one read of a neuron where there would be two or
three."""

from flashinfer.formats.architectures import model_config
from flashinfer.formats.number_formats import FORMATS
from flashinfer.study.activity import Study
from flashinfer.study.findings import Cell, Chart, Finding, Table
from flashinfer.synth.shapes import MIXTURES, NAMES, config_like

DTYPES = ("f16", "q4_0")
READS = 64  # units that a layer reads together


def run(study: Study) -> Finding:
    """The Finding for the study's profile."""
    rows: list[list[Cell]] = []
    gains: list[tuple[int, float, str]] = []
    for name in NAMES:
        config = model_config(config_like(name))
        ffn = next(layer.ffn for layer in config.layers if layer.ffn.d_ffn)
        row: list[Cell] = [name, "expert" if name in MIXTURES else "neuron"]
        for dtype in DTYPES:
            part = FORMATS[dtype].row_bytes(config.hidden_size) * ffn.unit_neurons
            times = [
                study.profile.batch_seconds(READS * ffn.parts / parts, READS * ffn.parts * part)
                for parts in (1, ffn.parts)
            ]
            row += [ffn.parts * part, times[0] / times[1]]
            if dtype == "f16":
                gains.append((ffn.parts * part, times[0] / times[1], name))
        rows.append(row)
    gains.sort()
    least, most = gains[-1], gains[0]
    answer = [
        f"On {study.profile.name} reading {READS} neurons of {most[2]} ({most[0] / 1024:.0f} KiB "
        f"in f16) as bundles is {most[1]:.2g} times as fast as reading their parts apart, and of "
        f"{least[2]} ({least[0] / 1024:,.0f} KiB) {least[1]:.2g} times.",
        "Bundling pays the more the smaller a part is. So it is worth more with 4 bits a number "
        "than with 16, and hardly anything for whole experts, whose parts are large.",
    ]
    return Finding(
        "bundling",
        "Bundling beyond the paper's models",
        "Does storing a neuron's rows and columns together pay for other architectures, sizes and "
        "number formats?",
        "Section 3.2, and the paper's first open question.",
        answer,
        [
            Table("Reading bundles instead of parts",
                  ["shape", "unit", "bytes, f16", "times as fast, f16", "bytes, q4_0",
                   "times as fast, q4_0"], rows)
        ],
        [
            Chart("What bundling is worth", "bytes of a bundle, f16", "times as fast",
                  {"f16": [(float(nbytes), gain) for nbytes, gain, _ in gains]}, log_x=True)
        ],
    )  # fmt: skip
