import pytest

from flashinfer.plan import threads


def test_two_threads_of_a_core_count_once(tmp_path):
    for cpu, siblings in enumerate(["0,4", "1,5", "2,6", "3", "0,4", "1,5", "2,6"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.physical_cores(range(7), tmp_path) == 4
    assert threads.physical_cores([0, 4], tmp_path) == 1
    assert threads.physical_cores([8, 9], tmp_path) == 2  # where the kernel does not say


@pytest.mark.parametrize(
    "name, text, cores",
    [
        ("cpu.max", "250000 100000\n", 2),
        ("cpu.max", "50000 100000\n", 1),
        ("cpu.max", "max 100000\n", None),
        ("cpu/cpu.cfs_quota_us", "400000\n", 4),
        ("cpu/cpu.cfs_quota_us", "-1\n", None),
    ],
)
def test_the_quota_in_whole_cores(tmp_path, name, text, cores):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert threads.cgroup_quota(tmp_path) == cores


def test_at_least_one():
    assert threads.default_threads() >= 1
