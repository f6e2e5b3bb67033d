"""The chapters' exercises, in order."""

from flashinfer.course.chapters import (
    bundling,
    drafting,
    foreseeing,
    merging,
    placing,
    planning,
    predicting,
    prefetching,
)
from flashinfer.course.lesson import Lesson

LESSONS: tuple[Lesson, ...] = (
    bundling, placing, predicting, merging, foreseeing, prefetching, planning, drafting,
)  # fmt: skip
