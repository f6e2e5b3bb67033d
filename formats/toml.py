"""Reading TOML files without trusting anything in them."""

from pathlib import Path
from typing import Any

from .errors import FormatError, UserError
from .files import read_text

MOST = 1 << 20  # bytes of a file


def read_toml(path: Path | str) -> dict[str, Any]:
    """What a TOML file says. Raises FormatError where it is not sound, UserError where this Python
    has no reader for it."""
    return parse_toml(read_text(path, MOST), path)


def parse_toml(text: str, path: Path | str) -> dict[str, Any]:
    """What a TOML text says; ``path`` is named in errors. Raises as ``read_toml``."""
    try:
        import tomllib
    except ImportError:  # before Python 3.11
        try:
            import tomli as tomllib
        except ImportError:
            raise UserError(
                f"{path}: reading TOML needs Python 3.11, or pip install tomli"
            ) from None
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: is not TOML: {error}") from None
