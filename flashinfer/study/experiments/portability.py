"""The same model on other machines: what the cost model expects on each known board, and here."""

from dataclasses import replace

from flashinfer import kernels
from flashinfer.plan.options import Options
from flashinfer.plan.profile import Profile, boards, load
from flashinfer.plan.setup import opened, prepare
from flashinfer.study.activity import Study
from flashinfer.study.findings import Cell, Chart, Finding, Point, Table

MEASURED = 48  # tokens that are generated here


def run(study: Study) -> Finding:
    """The Finding of the study's model."""
    profiles = {"this machine": study.profile}
    profiles |= {name: load(path) for name, path in boards().items()}
    rows: list[list[Cell]] = []
    speeds: list[Point] = []
    for number, (name, profile) in enumerate(profiles.items()):
        seconds, nbytes = expected(study, profile)
        speeds.append((float(number), 1 / seconds))
        rows.append([
            name, profile.threads, profile.dram / 1e9, profile.reads[max(profile.reads)] / 1e6,
            nbytes / 1e6, 1 / seconds,
        ])  # fmt: skip
    here = measured(study)
    answer = [
        f"Here {here:.3g} tokens/s were measured, and {1 / expected(study, study.profile)[0]:.3g} "
        f"expected by the profile of {study.profile.name}; kernels: {kernels.describe()}.",
        "The same file and the same tokens give the same bits on each: only seconds differ. The "
        "rows of boards are estimates, as their profiles say.",
    ]
    return Finding(
        "portability",
        "Portability: the same model elsewhere",
        "What would this model reach on other machines and disks?",
        "The summary's third next check: hardware beyond the paper's laptops.",
        answer,
        [
            Table(f"With {study.options.memory or 'all'} bytes of memory",
                  ["machine", "threads", "DRAM, GB/s", "reads of 1 MiB, MB/s", "MB read a token",
                   "expected tokens/s"], rows)
        ],
        [
            Chart("Expected tokens/s", "machine", "tokens/s", {"plan": speeds}, log_y=False,
                  kind="bars", labels=list(profiles))
        ],
    )  # fmt: skip


def expected(study: Study, profile: Profile) -> tuple[float, float]:
    """(seconds, bytes from flash) of a token by a profile."""
    options: Options = replace(study.options, device=profile)
    with opened(study.path, options) as bundle:
        setup = prepare(bundle, options)
        setup.flash.close()
    assert setup.expected is not None
    return setup.expected.total, setup.expected.bytes


def measured(study: Study) -> float:
    """Tokens/s of a generation here."""
    ids = list(study.samples[0].ids[:64])
    with study.open(draft="off") as model:
        most = min(MEASURED, model.plan.context - len(ids))
        list(model.generate(ids, most, temperature=0, stop_at_eos=False))
        return model.stats.generation.tokens_per_second
