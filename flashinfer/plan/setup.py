"""What is asked for -> how it will run: the checks, the open file, the plan, what to expect."""

from dataclasses import dataclass, replace

import numpy as np

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError
from flashinfer.kernels.doors import MOST_THREADS
from flashinfer.paper.flash import GAP_BYTES, IO, Flash
from flashinfer.paper.neuron_cache import POLICIES, default_policy
from flashinfer.paper.router import SURE
from flashinfer.plan import memory, profile
from flashinfer.plan.cost import Cost, predict
from flashinfer.plan.plan import Plan, make_plan
from flashinfer.plan.profile import Profile
from flashinfer.plan.threads import threads_to_use

SOON = 64  # tokens within which what is read at once should be used
NEURONS = ("predicted", "dense")  # to ask for; "routed" is what a mixture of experts does


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
    uses: list | None


def opened(path, neurons, budget=None):
    """The Bundle at ``path``; of a mixture with predictors, where neurons is "dense", as it was
    before they were made: by whole experts. Its header is parsed within ``budget``."""
    room = memory.header_room(budget)
    bundle = path if isinstance(path, Bundle) else Bundle(path, memory=room)
    if neurons == "dense" and bundle.config.neurons_apart:
        bundle.close()
        bundle = Bundle(bundle.path, calibrated=False, memory=room)
    return bundle


def prepare(
    bundle, budget=None, window=None, neurons=None, context=None, threads=None, io="auto",
    cache=None, device=None, warm=None, logit_rows=1,
):  # fmt: skip
    """The Setup of a bundle for the options of ``Model.open``, which see."""
    check(bundle, window, neurons, context, threads, io, cache)
    exact = bundle.config.sparse or not bundle.has_predictors  # thresholds must be asked for
    neurons = neurons or ("predicted" if bundle.has_predictors and exact else "dense")
    if bundle.config.reads_experts:
        neurons = "routed"
    context = context or min(bundle.config.max_position_embeddings, 1024)
    budget = memory.default_budget() if budget is None else memory.parse_size(budget)
    row_bytes = bundle.unit_bytes
    known = profile.find(device, bundle.path)
    flash = Flash(bundle.path, io, known.gap_bytes(row_bytes) if known else GAP_BYTES)
    try:
        stride = flash.row_stride(row_bytes)
        policy = cache or default_policy(window)
        threads = threads_to_use(threads)
        plan = make_plan(
            bundle, budget, context, neurons, policy, window, stride, threads, logit_rows
        )
        expected = None
        if known:
            plan, expected = _with_reads_ahead(bundle, plan, known, flash)
        elif bundle.config.reads_experts:
            plan = replace(plan, ahead=SURE)
        uses = _uses(bundle, plan, warm)
    except BaseException:
        flash.close()
        raise
    return Setup(flash, stride, plan, known, expected, uses)


def _with_reads_ahead(bundle, plan, known, flash):
    """(plan, Cost) of as many reads ahead as make a token fastest."""
    shares = (1.0, SURE, 0.0) if bundle.config.reads_experts else (1.0, 0.0)
    plans = [replace(plan, ahead=share) for share in shares]
    costs = [predict(bundle, p, known, flash.gap_bytes, flash.alignment) for p in plans]
    return min(zip(plans, costs, strict=True), key=lambda pair: pair[1].total)


def _uses(bundle, plan, warm):
    """How often units are used, where it pays to begin with the hottest ones, or is asked for."""
    uses = [bundle.uses(layer) for layer in range(bundle.config.num_hidden_layers)]
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


def check(bundle, window, neurons, context, threads, io, cache):
    """Raise UserError where an option is not one that this bundle can be run with."""
    most = bundle.config.max_position_embeddings
    if neurons not in (None, *NEURONS):
        raise UserError(f"neurons {neurons!r} is not one of {', '.join(NEURONS)}")
    if io not in IO:
        raise UserError(f"io {io!r} is not one of {', '.join(IO)}")
    if cache not in (None, *POLICIES):
        raise UserError(f"cache {cache!r} is not one of {', '.join(POLICIES)}")
    if neurons == "predicted" and bundle.config.experts and not bundle.config.sparse:
        raise UserError(
            f"{bundle.path}: the router of a mixture of experts knows what to use, nothing is "
            "predicted; leave --neurons away"
        )
    if neurons == "predicted" and not bundle.has_predictors:
        raise UserError(
            f"{bundle.path}: has no predictors; make them with flashinfer calibrate, "
            "or use --neurons dense"
        )
    if window is not None and window < 1:
        raise UserError(f"window {window} is not 1 token or more")
    if context is not None and not 1 <= context <= most:
        raise UserError(f"context {context} is not within the model's 1 to {most} tokens")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UserError(f"threads {threads} is not within 1 to {MOST_THREADS}")
