"""What importing the package brings along."""

import subprocess
import sys


def test_the_core_needs_numpy_and_tqdm_only():
    """Opening and running a model by token ids imports none of the extras."""
    code = (
        "import sys; import flashinfer.cli.main;"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'safetensors', 'pytest')"
        " if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
