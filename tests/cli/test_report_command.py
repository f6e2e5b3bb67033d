"""A machine's report: what a run was expected to do beside what it did, and nothing private."""

import getpass
import json
import platform

import pytest

from flashinfer.cli import report


@pytest.fixture
def quick(monkeypatch, quick_probe):
    monkeypatch.setattr(report, "TOKENS", 4)


def test_a_report(cli, tmp_path, quick):
    folder = tmp_path / "models"
    folder.mkdir()
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    code, out, err = cli("report", folder, "--like", "opt-125m", "-o", page, "--json", figures)
    assert code == 0 and not out and not list(folder.iterdir()), err
    found = json.loads(figures.read_text())
    assert [run["failed"] for run in found["runs"]] == [None] * 3
    for run in found["runs"]:
        assert run["tokens_per_second"] > 0 and run["expected_tokens_per_second"] > 0
        assert run["peak_rss_bytes"] <= run["memory_budget_bytes"]
    for text in (page.read_text(), figures.read_text()):
        for private in (platform.node() + ":", str(tmp_path), getpass.getuser() + ":"):
            assert private not in text
    assert page.read_text().count("| opt-125m") == 2


def test_a_run_that_fails_is_a_line_of_the_page(cli, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(report, "PROCESS", -(60 << 20))  # too small a budget
    code, out, err = cli("report", tmp_path, "--like", "opt-125m")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("| opt-125m")]
    assert len(lines) == 2 and all("is too small" in line for line in lines)
    assert str(tmp_path) not in out


def test_without_room_only_the_demo_model_runs(cli, tmp_path, quick, monkeypatch):
    assert report.largest(1 << 40) == "opt-1.3b" and report.largest(1 << 20) is None
    monkeypatch.setattr(report, "largest", lambda free: None)
    code, out, err = cli("report", tmp_path, "--json", "-")
    assert code == 0 and len(json.loads(out)["runs"]) == 1, err


def test_no_directory_is_one_line(cli, tmp_path):
    code, _, err = cli("report", tmp_path / "none")
    assert code == 1 and err.count("\n") == 1
