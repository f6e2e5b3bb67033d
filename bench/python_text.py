"""Python's own library as a text: what the demo model was trained on, and what it was not."""

import sysconfig
from pathlib import Path

TABLES = {"encodings", "pydoc_data", "site-packages", "__pycache__"}  # data, hardly code


def stdlib_files():
    """Return (train, held_out) lists of source texts; every 50th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    paths = [p for p in root.rglob("*.py") if not TABLES & set(p.relative_to(root).parts)]
    for index, path in enumerate(sorted(paths)):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        (held_out if index % 50 == 25 else train).append(text)
    return train, held_out
