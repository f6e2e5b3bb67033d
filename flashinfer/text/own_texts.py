"""Texts that are on every machine: Python's library, its documentation, random characters."""

import random
import string
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from flashinfer.text.tokenizer import Tokenizer

TABLES = {"encodings", "pydoc_data", "site-packages", "__pycache__"}  # data, hardly code
RANDOM = "random characters"
MOST_CHARACTERS, MOST_RANDOM = 1 << 20, 60_000  # of each text
CHARACTERS = 16  # of a text, more than a token has on average
PART = 1200  # characters taken from each held-out file: many files, not one


def stdlib_files() -> tuple[list[str], list[str]]:
    """(train, held_out) source texts of Python's library; every 50th file is held out, and the
    demo model has not seen it."""
    return list(_source(held_out=False)), list(_source(held_out=True))


def _source(held_out: bool) -> Iterator[str]:
    """Yield the source files that are held out, or the others, one at a time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in root.rglob("*.py") if not TABLES & set(p.relative_to(root).parts)]
    for index, path in enumerate(sorted(paths)):
        if (index % 50 == 25) != held_out:
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def of_other_kinds(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """So many token ids, or a few less, of all these texts: random characters get half as many as
    the others."""
    ids: list[int] = []
    texts = own_texts(CHARACTERS * tokens)
    parts = {name: 1 if name == RANDOM else 2 for name in texts}
    for name, part in parts.items():
        n = tokens * part // sum(parts.values())
        ids += tokenizer.encode(texts[name][: CHARACTERS * n])[:n]
    return ids


def own_texts(most: int = MOST_CHARACTERS) -> dict[str, str]:
    """{name: text}: code, prose in English where Python's documentation is there, characters."""
    texts = {"Python source": _joined((text[:PART] for text in _source(held_out=True)), most)}
    try:
        from pydoc_data.topics import topics
    except ImportError:
        pass
    else:
        texts["English"] = _joined(topics.values(), most)
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    texts[RANDOM] = "".join(random.Random(0).choices(letters, k=min(most, MOST_RANDOM)))
    return {name: text for name, text in texts.items() if text}


def _joined(parts: Iterable[str], most: int) -> str:
    """The parts, a line apart, as many as make up so many characters."""
    taken: list[str] = []
    for part in parts:
        taken.append(part)
        most -= len(part) + 1
        if most <= 0:
            break
    return "\n".join(taken)
