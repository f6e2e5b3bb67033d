"""How fast, and against what limit. Each file is a command: ``python -m bench.NAME``."""
