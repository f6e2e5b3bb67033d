"""Python's own library as a text: what the demo model was trained on, and what it was not."""

from flashinfer.study.texts import stdlib_files

__all__ = ["stdlib_files"]
