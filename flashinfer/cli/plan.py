"""Say what a model will need and how fast it will be, here or on another board, before it runs."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from flashinfer.cli.common import add_json, positive, write_json
from flashinfer.cli.model_options import add_model_arguments, options_of
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import UserError, printable
from flashinfer.formats.tensors import (
    ATTENTION,
    EMBEDDING,
    FFN,
    HEAD,
    PREDICTOR,
    ROLES,
    SMALL,
    Role,
)
from flashinfer.plan.cost import Cost
from flashinfer.plan.memory import format_size
from flashinfer.plan.plan import Plan, unit_name
from flashinfer.plan.profile import Profile
from flashinfer.plan.setup import Setup, opened, prepare


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N", help="tokens (up to 1024)")
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    with opened(args.model, options_of(args)) as bundle:
        setup = prepared(bundle, args)
        plan, profile, cost = setup.plan, setup.profile, setup.expected
        if profile is None or cost is None:
            raise UserError(
                "this device has not been measured; do so with flashinfer probe PATH, or name a "
                "device with --device"
            )
        formats = {tensor.format.name for tensor in bundle.tensors.values()}
        figures = {
            "model": str(bundle.path), "device": profile.name, "plan": asdict(plan),
            "formats_unmeasured": sorted(formats.intersection(profile.unmeasured)),
            "gap_bytes": setup.flash.gap_bytes, "threads": args.threads or profile.threads,
            "cost": {**asdict(cost), "bytes": cost.bytes, "total": cost.total,
                     "tokens_per_second": cost.tokens_per_second},
        }  # fmt: skip
        if args.json != "-":
            print_memory(plan, bytes_by_role(bundle), plan.kv_flash_bytes(bundle))
            print_cost(cost, figures, profile)
    write_json(args.json, figures)


def prepared(bundle: Bundle, args: Namespace) -> Setup:
    """The Setup of a bundle for the arguments of ``add_arguments``, with its Flash closed."""
    setup = prepare(bundle, options_of(args, context=args.ctx_size))
    setup.flash.close()
    return setup


def bytes_by_role(bundle: Bundle) -> dict[Role, int]:
    """{role: bytes in the file}."""
    sizes = dict.fromkeys(ROLES, 0)
    for spec in bundle.specs:
        sizes[spec.role] += bundle.tensors[spec.name].nbytes
    return sizes


def print_memory(plan: Plan, sizes: dict[Role, int], on_flash: int) -> None:
    """Print what stays in DRAM; sizes: ``bytes_by_role``; on_flash: bytes of keys and values."""
    stays = {
        "norms, biases": (plan.small, sizes[SMALL]),
        "predictors": (plan.predictor, sizes[PREDICTOR]),
        "attention": (plan.attention, sizes[ATTENTION]),
        "output head": (plan.head, sizes[HEAD]),
        "input embeddings": (plan.embeddings, sizes[EMBEDDING]),
        "feed-forward": (plan.cache, sizes[FFN]),
    }
    print(f"with a budget of {format_size(plan.budget)}   in DRAM     in the file")
    for name, (kept, size) in stays.items():
        if size:
            print(f"  {name:<24}{format_size(kept):>14} {format_size(size):>14}")
    print(
        f"  {'key/value cache':<24}{format_size(plan.kv_cache):>14}   {plan.context} tokens, "
        f"{plan.kv_dtype}"
    )
    if plan.kv_on_flash:
        print(
            f"  {'  on flash':<24}{format_size(on_flash):>14}   of {len(plan.kv_on_flash)} layers"
        )
    print(f"  {'buffers, activations':<24}{format_size(plan.buffers + plan.working):>14}")
    print(f"  {'interpreter, libraries':<24}{format_size(plan.base):>14}")


def print_cost(cost: Cost, figures: JsonObject, profile: Profile) -> None:
    """Print the bytes and the time of a token, by part."""
    plan = figures["plan"]
    unit = unit_name(plan["mode"])
    notes = [f"{figures['threads']} threads", f"cache: {plan['policy']}"]
    if unit == "neuron":
        notes.append(f"neurons up to {figures['gap_bytes']:,} bytes apart are read as one")
    if cost.requests:
        share = {0.0: "none", 1.0: "all"}.get(plan["prefetch"], "the surest half")
        notes.append(f"prefetched: {share} of the {unit}s guessed")
    if figures["formats_unmeasured"]:
        names = ", ".join(figures["formats_unmeasured"])
        notes.append(f"not measured there: {names}; taken as the number format nearest in size")
    print(
        f"\non {printable(profile.name)} ({printable(profile.note)})\n{'; '.join(notes)}\n\n"
        "a token                      read         time"
    )
    read = {**cost.read, "feed-forward": cost.read["neurons"]}
    for name, seconds in cost.seconds.items():
        nbytes = read.get(name, 0.0)
        if nbytes or seconds:
            print(f"  {name:<20}{nbytes / 1e6:10.2f} MB {1e3 * seconds:9.2f} ms")
    print(
        f"  {'in all':<20}{cost.bytes / 1e6:10.2f} MB {1e3 * cost.total:9.2f} ms: "
        f"{cost.tokens_per_second:.1f} tokens/s"
    )
