"""A GGUF file where a bundle is wanted: the bundle beside it, which has its weights in the file."""

import json
import subprocess
import sys
from pathlib import Path

from flashinfer.formats.errors import UserError
from flashinfer.formats.sources.gguf import is_gguf

SUFFIX = ".flash"  # behind the GGUF file's whole name
# In a process of its own, as parsing a vocabulary takes memory that Python does not give back.
CONVERT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from flashinfer.cli.main import main; sys.exit(main(sys.argv[2:]))"
)
PREFIX = b"flashinfer: error: "


def bundle_at(path: Path | str, silent: bool = True) -> Path:
    """The bundle that a model is opened by: ``path`` itself, or of a GGUF file its companion, which
    is made where there is none.

    silent  False: what is made, and how far it is, is said on stderr
    Raises UserError where the companion cannot be made.
    """
    if not is_gguf(path):
        return Path(path)
    made = companion_of(path)
    if made is None:
        made = _beside(path)
        _make(path, made, silent)
    return made


def companion_of(path: Path | str) -> Path | None:
    """The companion of a GGUF file, or None where there is none, or it is no such file."""
    return _beside(path) if is_gguf(path) and _beside(path).exists() else None


def _beside(path: Path | str) -> Path:
    return Path(f"{path}{SUFFIX}")


def _make(path: Path | str, companion: Path, silent: bool) -> None:
    arguments = ["convert", "--in-place", "--", str(path), str(companion)]
    said = b""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", CONVERT, json.dumps(sys.path), *arguments],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        while some := process.stderr.read(1 << 12):
            said += some
            if not silent and PREFIX not in said:  # an error is the last that it says
                sys.stderr.write(some.decode(errors="replace"))
                sys.stderr.flush()
    if process.returncode:
        error = said.partition(PREFIX)[2].decode(errors="replace").strip()
        raise UserError(error or f"{companion}: could not be made")
