"""The SHA-256 of every file of a kit: the same on every machine and with every NumPy.

    python tests/oracle/kit_hashes.py [--write]

prints a JSON object of them, or writes it to tests/oracle/kit_hashes.json, with which test_kits.py
compares. Where one changes, ``VERSION`` in flashinfer/oracle/kits/draws.py grows.
"""

import json
import sys
import tempfile
from pathlib import Path

from flashinfer.oracle.kits.kit import write_kit

COMMITTED = Path(__file__).with_suffix(".json")


def hashes(manifest):
    """{path within the kit: SHA-256} of a manifest."""
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def main():
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps(hashes(write_kit(Path(folder) / "kit")), indent=1) + "\n"
    if "--write" in sys.argv[1:]:
        COMMITTED.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
