"""Texts that are on every machine, to study a model on: Python's library, and random characters."""

import random
import string
import sysconfig
from pathlib import Path

TABLES = {"encodings", "pydoc_data", "site-packages", "__pycache__"}  # data, hardly code
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
    texts["random characters"] = "".join(random.Random(0).choices(letters, k=60_000))
    return {name: text for name, text in texts.items() if text}
