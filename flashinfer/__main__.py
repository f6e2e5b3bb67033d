"""``python -m flashinfer`` is the command ``flashinfer``."""

import sys

from flashinfer.cli.main import main

sys.exit(main())
