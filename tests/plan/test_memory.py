import os
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.cgroup import NoCgroups, run_limited
from flashinfer import Model
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import BudgetError, UserError
from flashinfer.plan import memory
from flashinfer.plan.memory import MIB, parse_size
from flashinfer.plan.options import Options
from flashinfer.plan.plan import make_plan
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import opt_config


@pytest.mark.parametrize(
    "text, size",
    [("600M", 600 << 20), ("1.5G", 3 << 29), ("2GiB", 2 << 30), ("64k", 65536), ("77", 77), (9, 9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "0", "1e9", None, 0, True])
def test_wrong_sizes(text):
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)


def plan(path, budget, neurons="predicted", window=None, context=64, policy=None):
    options = Options(budget, window, neurons, context, threads=1, cache=policy)
    with Bundle(path) as bundle:
        return make_plan(bundle, options.decided(bundle), [1024] * 4, base=30 * MIB)


@pytest.mark.parametrize("neurons", ["predicted", "dense"])
@pytest.mark.parametrize("window", [None, 1, 5, 50])
def test_a_plan_never_exceeds_its_budget(synthetic, neurons, window):
    with pytest.raises(BudgetError) as caught:
        plan(synthetic, 1, neurons, window)
    least, before = caught.value.least, None
    with pytest.raises(BudgetError):
        plan(synthetic, least - 4 * MIB, neurons, window)
    for budget in range(least, least + 40 * MIB, 333_333):
        p = plan(synthetic, budget, neurons, window)
        assert p.base + p.resident + p.kv_cache + p.buffers + p.working + p.cache <= budget
        if before:
            assert p.attention_layers >= before.attention_layers
        before = p
    assert before.attention_layers == 4 and before.head > 0
    if neurons == "predicted":
        with pytest.raises(BudgetError):  # the least that is named has some MiB to spare
            for budget in range(least, 0, -MIB // 16):
                tightest = plan(synthetic, budget, neurons, window)
        assert tightest.predictor == 0 < before.predictor


def test_the_window_bounds_the_cache(synthetic):
    rows = [sum(plan(synthetic, 2 << 30, window=k).slots) for k in (1, 2, 5, 8, 12, 200)]
    assert rows == sorted(rows) and rows[0] < rows[3] < rows[5] <= 4 * 1024
    assert plan(synthetic, 2 << 30).slots == (1024,) * 4


def test_a_window_takes_nothing_from_dense(synthetic):
    """All neurons are used by every token, so layers that fit stay, whatever the window."""
    assert plan(synthetic, 2 << 30, "dense", window=5) == replace(
        plan(synthetic, 2 << 30, "dense"), policy="window"
    )
    with Model.open(synthetic, neurons="dense", window=5, context=16) as model:
        assert all(layer.feed_forward.whole.offsets is not None for layer in model.layers)


def test_the_window_that_the_budget_affords(synthetic):
    for window in (1, 3, 8):
        assert plan(synthetic, 2 << 30, window=window).affords == window


def test_cgroup_limits_are_found(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "memory" / "a" / "b").mkdir(parents=True)
    (root / "memory" / "a" / "b" / "memory.limit_in_bytes").write_text("500\n")
    (root / "memory" / "a" / "memory.limit_in_bytes").write_text("400\n")
    (root / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (root / "c").mkdir()
    (root / "c" / "memory.max").write_text("300\n")
    proc.write_text("4:memory:/a/b\n2:cpu:/\n0::/c\n")
    assert sorted(memory._cgroup_limits(proc, root)) == [300, 400, 500]
    proc.write_text("0::/\n")
    assert memory._cgroup_limits(proc, root) == []
    assert memory._cgroup_limits(tmp_path / "none", root) == []


def test_default_budget_is_below_what_there_is():
    assert 0 < memory.default_budget() < memory._meminfo("MemTotal")


def least_of_a_new_process(path, *options):
    run = subprocess.run(
        [sys.executable, "-m", "flashinfer", "run", str(path), "--memory", "1M", *options],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and "the least for a context" in run.stderr
    return int(run.stderr.rsplit(" is ", 1)[1].strip().rstrip("M"))


@pytest.mark.parametrize("neurons", ["predicted", "dense"])
def test_the_least_budget_holds_in_a_cgroup_of_that_size(synthetic, neurons):
    """Whole process, page cache and kernel memory included; peak RSS stays under it, too."""
    options = ["--tokens", "5,6,7", "-n", "30", "--temp", "0", "--neurons", neurons]
    for io in ("auto", "threads", "buffered"):
        options += ["--io", io]
        least = least_of_a_new_process(synthetic, *options)
        for budget in (least, least + 4):
            command = [
                sys.executable, "-m", "flashinfer", "run", str(synthetic), *options,
                "--memory", f"{budget}M",
            ]  # fmt: skip
            try:
                run = run_limited(command, budget << 20, capture_output=True, text=True)
            except NoCgroups as error:
                pytest.skip(str(error))
            assert run.returncode == 0, (run.returncode, run.stderr)
            peak = float(run.stderr.split("memory ")[1].split()[0])
            assert peak <= budget


@pytest.mark.parametrize("threads", ["8", "1024"])
def test_the_least_budget_holds_with_many_threads(synthetic, threads):
    """More than the CPUs can use are started a few at most; their stacks are in the budget."""
    options = ["--tokens", "5,6,7", "-n", "9", "--temp", "0", "-t", threads]
    least = least_of_a_new_process(synthetic, *options)
    command = [
        sys.executable, "-m", "flashinfer", "run", str(synthetic), *options, "--memory",
        f"{least}M",
    ]  # fmt: skip
    try:
        run = run_limited(command, least << 20, capture_output=True, text=True)
    except NoCgroups as error:
        pytest.skip(str(error))
    assert run.returncode == 0, (run.returncode, run.stderr)
    clamped = int(threads) > 4 * len(os.sched_getaffinity(0))
    assert run.stderr.count("threads are more than") == clamped


EVALUATION = """
import sys
from flashinfer import BudgetError, Model
from flashinfer.study.perplexity import LOGIT_ROWS, evaluate
try:
    with Model.open(sys.argv[1], memory=sys.argv[2], logit_rows=LOGIT_ROWS) as model:
        print(*evaluate(model, range(3, 203)))
except BudgetError as error:
    print(error.least >> 20)
"""


def test_evaluating_lives_in_its_budget(tmp_path):
    """Of a large vocabulary, the logits of several tokens are most of what is needed."""
    path = tmp_path / "x.flash"
    synthesize(path, opt_config(64, 1, 1, 64, vocab_size=100_000, positions=128), "f16")
    command = [sys.executable, "-c", EVALUATION, str(path)]
    run = subprocess.run([*command, "1M"], capture_output=True, text=True, check=True)
    for budget in (int(run.stdout), int(run.stdout) + 8, int(run.stdout) + 40):
        try:
            run = run_limited(
                [*command, f"{budget}M"], budget << 20, capture_output=True, text=True
            )
        except NoCgroups as error:
            pytest.skip(str(error))
        assert run.returncode == 0 and run.stdout.endswith(" 198\n"), (budget, run)


def test_the_default_budget_is_the_cgroup(synthetic):
    command = [
        sys.executable,
        "-m",
        "flashinfer",
        "run",
        str(synthetic),
        "--tokens",
        "5",
        "-n",
        "4",
    ]
    try:
        run = run_limited(command, 150 << 20, capture_output=True, text=True)
    except NoCgroups as error:
        pytest.skip(str(error))
    assert run.returncode == 0 and f"of {0.95 * 150:.0f} MiB" in run.stderr
