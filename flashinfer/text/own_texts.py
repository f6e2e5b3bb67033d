"""Texts that are on every machine: Python's library, its documentation, random characters."""

import random
import string
import sysconfig
from pathlib import Path

from flashinfer.text.tokenizer import Tokenizer

TABLES = {"encodings", "pydoc_data", "site-packages", "__pycache__"}  # data, hardly code
RANDOM = "random characters"
CHARACTERS = 16  # of a text, more than a token has on average
PART = 1200  # characters taken from each held-out file: many files, not one


def stdlib_files() -> tuple[list[str], list[str]]:
    """(train, held_out) source texts of Python's library; every 50th file is held out, and the
    demo model has not seen it."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[str] = []
    held_out: list[str] = []
    paths = [p for p in root.rglob("*.py") if not TABLES & set(p.relative_to(root).parts)]
    for index, path in enumerate(sorted(paths)):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        (held_out if index % 50 == 25 else train).append(text)
    return train, held_out


def of_other_kinds(tokenizer: Tokenizer, tokens: int) -> list[int]:
    """So many token ids, or a few less, of all these texts: random characters get half as many as
    the others."""
    texts = own_texts()
    parts = {name: 1 if name == RANDOM else 2 for name in texts}
    ids: list[int] = []
    for name, part in parts.items():
        n = tokens * part // sum(parts.values())
        ids += tokenizer.encode(texts[name][: CHARACTERS * n])[:n]
    return ids


def own_texts() -> dict[str, str]:
    """{name: text}: code, prose in English where Python's documentation is there, characters."""
    texts = {"Python source": "\n".join(text[:PART] for text in stdlib_files()[1])}
    try:
        from pydoc_data.topics import topics
    except ImportError:
        pass
    else:
        texts["English"] = "\n".join(topics.values())
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    texts[RANDOM] = "".join(random.Random(0).choices(letters, k=60_000))
    return {name: text for name, text in texts.items() if text}
