"""What is asked for -> how it will run: the checks, the open file, the plan, what to expect."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.paper.flash import GAP_BYTES, Flash
from flashinfer.paper.router import SURE
from flashinfer.plan import memory, profile
from flashinfer.plan.cost import Cost, predict
from flashinfer.plan.options import Options
from flashinfer.plan.plan import Plan, make_plan
from flashinfer.plan.profile import Profile

SOON = 64  # tokens within which what is read at once should be used


@dataclass
class Setup:
    """flash: open; stride: bytes of a row of the neuron caches; profile and expected (of a token)
    are None where nothing is known of the device; uses: of each layer how often its units are
    used, where the hottest are to be read at once, else None."""

    flash: Flash
    stride: int
    plan: Plan
    profile: Profile | None
    expected: Cost | None
    uses: list[Any] | None


def opened(path: Path | str | Bundle, options: Options) -> Bundle:
    """The Bundle at ``path``, its header parsed within the budget. Of a mixture with predictors,
    where "dense" is asked for, it is as it was before they were made: by whole experts."""
    room = memory.header_room(options.memory)
    bundle = path if isinstance(path, Bundle) else Bundle(path, memory=room)
    if options.neurons == "dense" and bundle.config.neurons_apart:
        bundle.close()
        bundle = Bundle(bundle.path, calibrated=False, memory=room)
    return bundle


def prepare(bundle: Bundle, options: Options) -> Setup:
    """The Setup of a bundle. Raises UserError where an option cannot be had for it, BudgetError
    where the budget is too small, FormatError where the file cannot be read."""
    wanted = options.decided(bundle)
    known = profile.find(options.device, bundle.path)
    gap_bytes = known.gap_bytes(bundle.unit_bytes) if known else GAP_BYTES
    flash = Flash(bundle.path, options.io, gap_bytes)
    try:
        stride = flash.row_stride(bundle.unit_bytes)
        plan = make_plan(bundle, wanted, stride)
        expected = None
        if known:
            plan, expected = _with_reads_ahead(bundle, plan, known, flash)
        elif bundle.config.reads_experts:
            plan = replace(plan, ahead=SURE)
        uses = _uses(bundle, plan, options.warm)
    except BaseException:
        flash.close()
        raise
    return Setup(flash, stride, plan, known, expected, uses)


def _with_reads_ahead(
    bundle: Bundle, plan: Plan, known: Profile, flash: Flash
) -> tuple[Plan, Cost]:
    """(plan, Cost) of as many reads ahead as make a token fastest."""
    shares = (1.0, SURE, 0.0) if bundle.config.reads_experts else (1.0, 0.0)
    plans = [replace(plan, ahead=share) for share in shares]
    costs = [predict(bundle, p, known, flash.gap_bytes, flash.alignment) for p in plans]
    return min(zip(plans, costs, strict=True), key=lambda pair: pair[1].total)


def _uses(bundle: Bundle, plan: Plan, warm: bool | None) -> list[Any] | None:
    """How often units are used, where it pays to begin with the hottest ones, or is asked for."""
    uses: list[Any] = [bundle.uses(layer) for layer in range(bundle.config.num_hidden_layers)]
    if None in uses or plan.window:
        if warm:
            raise UserError(
                f"{bundle.path}: nothing is known of which experts are used most; flashinfer "
                "calibrate finds it for a mixture, and --window drops what is not used"
            )
        return None
    if warm is None:
        hottest = [
            sorted(used, reverse=True)[:rows]
            for used, rows in zip(uses, plan.cache_rows, strict=True)
        ]
        soon = 1 - (1 - np.concatenate(hottest)) ** SOON
        warm = soon.size > 0 and soon.mean() >= 0.9
    return uses if warm else None
