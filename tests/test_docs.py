"""What the pages name is there: code, files, links, anchors, commands and their options."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from flashinfer.cli.main import COMMANDS, make_parser
from flashinfer.cli.run import demo_model
from flashinfer.formats.architectures import ARCHITECTURES
from flashinfer.formats.bundle import in_place
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.sources.gguf_forms import FORMS
from flashinfer.generation import session
from flashinfer.oracle import trace_file

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")])
on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def exists(name):
    """Whether ``name`` is a module, or something in one: package.module.Class.method."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code_blocks(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@on_every_page
def test_every_name_is_in_the_code_or_in_a_bundle(page):
    with Bundle(demo_model()) as bundle:
        keys = {*bundle.file.metadata, *trace_file.KEYS, *session.KEYS, in_place.KEY}
    names = set(re.findall(r"`(flashinfer(?:\.\w+)+)`", page.read_text()))
    assert [name for name in sorted(names - keys) if not exists(name)] == []


@on_every_page
def test_every_file_is_there(page):
    names = re.findall(r"`((?:[\w.-]+/)+[\w.*-]*)`", page.read_text())
    own = {"flashinfer", "formats", "_native", "tests", "bench", "docs", ".ci", ".github"}
    ours = [name for name in names if name.split("/")[0] in own]
    assert [name for name in ours if not list(ROOT.glob(name.rstrip("/")))] == []


@on_every_page
def test_every_link_leads_somewhere(page):
    text = without_code_blocks(page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@on_every_page
def test_every_command_line_is_understood(page):
    lines = re.findall(r"^ *(?:.*&& )?(flashinfer .*|python -m .*)$", page.read_text(), re.M)
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "flashinfer":
            make_parser().parse_args(words[1:])  # exits where an option is unknown
        elif words[2].startswith("bench."):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), line


def test_every_command_that_writes_json_has_a_section():
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "json.md").read_text(), re.M)
    assert set(sections) - {"Benchmarks"} == set(COMMANDS) - {"chat"}


def test_every_architecture_has_a_row():
    text = (ROOT / "docs" / "architectures.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| [^|]+ \| [^|]+ \|$", text, re.M)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert named == {"model_type", *ARCHITECTURES}


def test_every_form_of_gguf_has_a_row():
    text = (ROOT / "docs" / "architectures.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \| ([^|]+) \|$", text, re.M)
    assert [name for name, _ in rows] == ["general.architecture", *FORMS]
    assert all(f"`{form.model_type}`" in dict(rows)[name] for name, form in FORMS.items())
