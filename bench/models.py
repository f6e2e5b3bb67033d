"""The synthetic models that benches run on."""

from contextlib import contextmanager

from flashinfer.cli.common import progress_bars
from flashinfer.synth import synthesize
from flashinfer.synth.shapes import config_like


@contextmanager
def synthetic_model(path, like, dtype="f16", keep=False):
    """The bundle at ``path``, made where it is not there yet; unless ``keep``, removed again."""
    made = not path.exists()
    try:
        if made:
            with progress_bars() as progress:
                synthesize(path, config_like(like), dtype, progress=progress)
        yield path
    finally:
        if made and not keep:
            path.unlink(missing_ok=True)
