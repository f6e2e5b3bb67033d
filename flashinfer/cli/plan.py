"""Say what a model will need and how fast it will be, here or on another board, before it runs."""

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from flashinfer.cli.common import add_dtypes, add_json, positive, progress_bars, write_json
from flashinfer.cli.model_options import add_model_arguments, options_of
from flashinfer.cli.outlines import to_plan
from flashinfer.cli.plan_table import page_of, prepared, print_table, table
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError, printable
from flashinfer.formats.files import replacing
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
from flashinfer.plan.conversion import Conversion, conversion_of
from flashinfer.plan.cost import Cost
from flashinfer.plan.memory import format_size
from flashinfer.plan.plan import Plan, unit_name
from flashinfer.plan.profile import Profile, bytes_by_format
from flashinfer.plan.setup import opened
from flashinfer.synth.shapes import NAMES


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a bundle, or a model that is to become one: a "
        "config.json, a directory with one, a GGUF file, a name on the Hugging Face Hub, or an "
        "address of one of these files",
    )  # fmt: skip
    parser.add_argument(
        "--like", choices=NAMES, metavar="NAME", help=f"a published shape: {', '.join(NAMES)}"
    )
    add_dtypes(parser, default=None, meaning="f16; of a GGUF file its own")
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N", help="tokens (up to 1024)")
    parser.add_argument(
        "--table", action="store_true", help="tokens/s by budget, on this device and on the boards "
        "that are known; --memory: the largest budget",
    )  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="write the --table as a page with a chart")
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    if args.html and not args.table:
        raise UserError("--html is for --table")
    with (
        to_plan(args.model, args.like, args.dtype, args.dense_dtype) as (path, source),
        opened(path, options_of(args)) as bundle,
    ):
        name = args.model or args.like
        if args.table:
            with progress_bars() as progress:
                rows = table(bundle, args, progress)
            if args.json != "-":
                print_table(name, bundle.nbytes, rows)
            if args.html:
                with replacing(args.html) as file:
                    file.write(page_of(name, bundle.nbytes, rows).encode())
            write_json(args.json, {"model": name, "bytes": bundle.nbytes, "table": rows})
            return
        setup = prepared(bundle, args)
        plan, profile, cost = setup.plan, setup.profile, setup.expected
        if profile is None or cost is None:
            raise UserError(
                "this device has not been measured; do so with flashinfer probe PATH, or name a "
                "device with --device"
            )
        taken = conversion(args, source, bundle, profile)
        formats = {name for t in bundle.tensors.values() for name in bytes_by_format(t)}
        figures = {
            "model": name, "device": profile.name, "plan": asdict(plan),
            "bytes": bundle.nbytes,
            "formats_unmeasured": sorted(formats.intersection(profile.unmeasured)),
            "conversion": None if taken is None else {
                **asdict(taken), "least_seconds": taken.least_seconds,
            },
            "gap_bytes": setup.flash.gap_bytes, "threads": args.threads or profile.threads,
            "cost": {**asdict(cost), "bytes": cost.bytes, "total": cost.total,
                     "tokens_per_second": cost.tokens_per_second},
        }  # fmt: skip
        if args.json != "-":
            if taken is not None:
                print_assumed(name, bundle, taken)
            print_memory(plan, bytes_by_role(bundle), plan.kv_flash_bytes(bundle))
            print_cost(cost, figures, profile, bundle.config)
    write_json(args.json, figures)


def conversion(
    args: Namespace, source: int | None, bundle: Bundle, profile: Profile
) -> Conversion | None:
    """What it takes to convert a model to this bundle; None where it is one already. Weights are
    kept as a GGUF file has them unless another number format is asked for."""
    if source is None:
        return None
    kept = source > 0 and args.dtype is None and args.dense_dtype is None
    return conversion_of(bundle, source, kept, profile)


def print_assumed(name: str, bundle: Bundle, taken: Conversion) -> None:
    """Print what is planned of a model that is not here, and what is taken for granted."""
    layers = bundle.config.layers
    assumed = "every neuron is used by every token"
    if bundle.config.mixture:
        assumed = "each token chooses its experts as if it were the only one"
    elif any(layer.ffn.sparse for layer in layers):
        assumed += ": no neuron is known to be silent before calibrate"
    of_16_bits = ", taken as 16 bits a weight" if taken.assumed else ""
    encoding = ""
    if taken.encode_seconds:
        encoding = f", and encoding {duration(taken.encode_seconds)} on this machine"
    print(
        f"{printable(name)} as a bundle: {format_size(taken.writes)}\n"
        f"to convert: {format_size(taken.reads)} are read{of_16_bits}, which takes with "
        f"writing {duration(taken.flash_seconds)} or more on this flash{encoding}; the disk needs "
        "room for both"
    )
    if taken.in_place:
        print("or not at all: flashinfer run reads the GGUF file where it lies")
    print(f"uncalibrated: {assumed}\n")


def duration(seconds: float) -> str:
    """Seconds or minutes, for people."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


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


def print_cost(cost: Cost, figures: JsonObject, profile: Profile, config: ModelConfig) -> None:
    """Print the bytes and the time of a token, by part."""
    plan = figures["plan"]
    unit = unit_name(plan["mode"], config)
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
