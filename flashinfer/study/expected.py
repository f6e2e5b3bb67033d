"""What the plan expects of a token, for a budget that does not count this process."""

from dataclasses import replace
from typing import Any

from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import BudgetError
from flashinfer.plan.cost import Cost
from flashinfer.plan.profile import Profile
from flashinfer.plan.setup import prepare
from flashinfer.study.activity import Study

BASE = 100 << 20  # bytes of a process besides the model
CONTEXT = 128


def expected(
    study: Study, bundle: Bundle, memory: int, profile: Profile | None = None, **options: Any
) -> Cost:
    """The Cost of a token with ``memory`` bytes for the model, or with the least that will do.

    profile  None: the study's; options: of ``Options``
    """
    known = profile or study.profile
    wanted = replace(study.options, memory=BASE + memory, context=CONTEXT, device=known,
                     draft="off", **options)  # fmt: skip
    try:
        setup = prepare(bundle, wanted, BASE)
    except BudgetError as error:
        setup = prepare(bundle, replace(wanted, memory=error.least), BASE)
    setup.flash.close()
    if setup.expected is None:
        raise AssertionError("a profile is known, and yet nothing is expected")
    return setup.expected
