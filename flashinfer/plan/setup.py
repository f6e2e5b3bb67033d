"""What is asked for -> how it will run: the checks, the open file, the plan, what to expect."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import BudgetError, UserError
from flashinfer.paper.flash import GAP_BYTES, Flash
from flashinfer.paper.pieces import pieces_of_layer
from flashinfer.paper.router import SURE
from flashinfer.plan import memory, profile
from flashinfer.plan.companion import bundle_at
from flashinfer.plan.cost import Cost, predict
from flashinfer.plan.options import Decided, Options
from flashinfer.plan.plan import Plan, make_plan
from flashinfer.plan.profile import Profile

TEXTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # to write at a time
USUAL_TEXTS = 16  # where nothing is known of the device
LEAST_GAIN = 0.03  # of a token's seconds, for which more texts are worth their memory
KV_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of layers, whose keys and values may lie on flash
MUCH = 8  # keys and values that take at most this part of the budget stay in DRAM
CLEARLY = 0.1  # of a token's seconds, for which more keys and values are worth writing to flash
SOON = 64  # tokens within which what is read at once should be used


@dataclass
class Setup:
    """How a model will run.

    flash     open
    profile   of the device, and expected, of a token; None where nothing is known of the device
    pass_seconds  a function tokens -> seconds of a pass of so many; None as ``expected``
    uses      of each layer how often its units are used, or None of a layer that uses all of
              them, where the hottest are to be read at once; else None
    scratch   the folder for the keys and values that do not stay, or None
    """

    flash: Flash
    plan: Plan
    profile: Profile | None
    expected: Cost | None
    pass_seconds: Callable[[int], float] | None
    uses: list[tuple[float, ...] | None] | None
    scratch: Path | None


def opened(path: Path | str | Bundle, options: Options) -> Bundle:
    """The Bundle at ``path``, or of a GGUF file its companion, its header parsed within the
    budget. Of a mixture with predictors,
    where "dense" is asked for, it is as it was before they were made: by whole experts."""
    room = memory.header_room(options.memory)
    bundle = path if isinstance(path, Bundle) else Bundle(bundle_at(path), memory=room)
    if options.neurons == "dense" and bundle.config.mixture and bundle.has_predictors:
        bundle.close()
        bundle = Bundle(bundle.path, calibrated=False, memory=room)
    return bundle


def prepare(bundle: Bundle, options: Options, base: int | None = None) -> Setup:
    """The Setup of a bundle; base: bytes that the process takes besides, None: what it takes now.
    Raises UserError where an option cannot be had for it, BudgetError where the budget is too
    small, FormatError where the file cannot be read."""
    wanted, base = options.decided(bundle), memory.rss() if base is None else base
    known = profile.find(options.device, bundle.path)
    unit_bytes = [bundle.unit_bytes(layer) for layer in range(bundle.config.num_hidden_layers)]
    gap_bytes = _gap_bytes(bundle, wanted, known, unit_bytes)
    flash = Flash(bundle.path, options.io, gap_bytes, sources=bundle.source_files)
    try:
        slot_bytes = [
            pieces_of_layer(bundle, layer, flash.alignment).slot_bytes
            for layer in range(bundle.config.num_hidden_layers)
        ]
        scratch = options.scratch_of(bundle)
        plan = _with_keys_and_values(
            bundle, wanted, slot_bytes, base, known, flash, scratch is not None
        )
        wanted = replace(wanted, kv_share=plan.kv_share)
        if options.fewer:
            wanted = replace(wanted, texts=options.texts)
            plan = _for_throughput(bundle, plan, wanted, slot_bytes, base, known, flash)
        expected = pass_seconds = None
        if known:
            wanted = replace(wanted, texts=plan.texts)
            other = replace(wanted, fewest_reads=True)
            if bundle.config.reads_experts:
                other = replace(wanted, experts_first=True)
            plans = [plan, make_plan(bundle, other, slot_bytes, base)]
            plan, expected = _fastest(bundle, plans, known, flash)
            pass_seconds = partial(_pass_seconds, bundle, plan, known, flash)
        elif bundle.config.reads_experts:
            plan = replace(plan, prefetch=SURE)
        uses = _uses(bundle, plan, options.warm)
    except BaseException:
        flash.close()
        raise
    return Setup(flash, plan, known, expected, pass_seconds, uses, scratch)


def _with_keys_and_values(
    bundle: Bundle,
    wanted: Decided,
    slot_bytes: list[int],
    base: int,
    known: Profile | None,
    flash: Flash,
    may_write: bool,
) -> Plan:
    """The plan with as many layers' keys and values in DRAM as fit; or, if all would take much of
    the budget and ``may_write``, with as many as make a token clearly faster."""
    plans: list[Plan] = []
    refused = None
    for share in KV_SHARES if may_write else (0.0,):
        try:
            plan = make_plan(bundle, replace(wanted, kv_share=share), slot_bytes, base)
        except BudgetError as error:
            refused = error
            continue
        if plan.kv_on_flash or share == 0:
            plans.append(plan)
        if known is None or plan.kv_cache <= wanted.budget // MUCH:
            break
    if not plans:
        raise refused or AssertionError
    if len(plans) == 1 or known is None:
        return plans[0]
    costs = [_pass_seconds(bundle, plan, known, flash, 1) for plan in plans]
    costs[0] *= 1 - CLEARLY
    return plans[int(np.argmin(costs))]


def _for_throughput(
    bundle: Bundle,
    plan: Plan,
    wanted: Decided,
    slot_bytes: list[int],
    base: int,
    known: Profile | None,
    flash: Flash,
) -> Plan:
    """The plan for as many texts, up to ``wanted.texts``, as give the most tokens a second; where
    nothing is known of the device, for as many as take an eighth of the budget for their keys and
    values.

    plan  for one text
    """
    best, seconds = plan, math.inf
    if known is not None:
        seconds = _pass_seconds(bundle, plan, known, flash, 1)
    for texts in sorted({min(texts, wanted.texts) for texts in TEXTS}):
        try:
            other = make_plan(bundle, replace(wanted, texts=texts), slot_bytes, base)
        except BudgetError:
            break
        if known is None:
            if other.kv_cache > other.budget // 8 or texts > USUAL_TEXTS:
                break
            best = other
        else:
            each = _pass_seconds(bundle, other, known, flash, texts) / texts
            if each < (1 - LEAST_GAIN) * seconds:
                best, seconds = other, each
    return best


def _gap_bytes(
    bundle: Bundle, wanted: Decided, known: Profile | None, unit_bytes: list[int]
) -> int:
    """How far apart units may lie that are read as one: that of the smallest which are chosen."""
    if known is None:
        return GAP_BYTES
    layers = zip(bundle.config.layers, unit_bytes, strict=True)
    chosen = [nbytes for layer, nbytes in layers if wanted.chooses(layer.ffn)]
    return known.gap_bytes(min(chosen or unit_bytes))


def _fastest(bundle: Bundle, plans: list[Plan], known: Profile, flash: Flash) -> tuple[Plan, Cost]:
    """(plan, Cost) of the plan, and the share of guesses to prefetch, that make a token fastest."""
    shares = (1.0, SURE, 0.0) if bundle.config.reads_experts else (1.0, 0.0)
    plans = [replace(plan, prefetch=share) for plan in plans for share in shares]
    costs = [predict(bundle, p, known, flash.gap_bytes, flash.alignment) for p in plans]
    return min(zip(plans, costs, strict=True), key=lambda pair: pair[1].total)


def _pass_seconds(bundle: Bundle, plan: Plan, known: Profile, flash: Flash, tokens: int) -> float:
    return predict(bundle, plan, known, flash.gap_bytes, flash.alignment, tokens).total


def _uses(bundle: Bundle, plan: Plan, warm: bool | None) -> list[tuple[float, ...] | None] | None:
    """How often units are used, where it pays to begin with the hottest ones, or is asked for."""
    ffns = [layer.ffn for layer in bundle.config.layers]
    uses = [bundle.uses(layer) for layer in range(len(ffns))]
    unknown = any(plan.chooses(ffn) and used is None for ffn, used in zip(ffns, uses, strict=True))
    if unknown or plan.window or not any(uses):
        if warm:
            raise UserError(
                f"{bundle.path}: nothing is known of which experts are used most; flashinfer "
                "calibrate finds it for a mixture, and --window drops what is not used"
            )
        return None
    if warm is None:
        hottest = [
            sorted(used, reverse=True)[:slots]
            for used, slots in zip(uses, plan.slots, strict=True)
            if used
        ]
        soon = 1 - (1 - np.concatenate(hottest)) ** SOON
        warm = soon.size > 0 and soon.mean() >= 0.9
    return uses if warm else None
