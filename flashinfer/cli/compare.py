"""Judge another engine's run: name its first operation that is wrong.

The exit code is 0 where the engine conforms and 1 where it does not. REFERENCE is a model (a
bundle, a checkpoint's directory or a GGUF file), by which each operation is recomputed; a golden
(flashinfer trace --golden), by whose noise samples are judged; or another trace, whose bits OTHER
has to have.
"""

from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import NotConforming, add_json, progress_bars, write_json
from flashinfer.formats.errors import FormatError, UserError
from flashinfer.formats.files import replacing
from flashinfer.oracle.arithmetic import Arithmetic, arithmetic_named
from flashinfer.oracle.compare import Comparison, compare
from flashinfer.oracle.golden import compare_with_golden
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.oracle.replacement import first_difference, replace_values
from flashinfer.oracle.report import junit, lines, page
from flashinfer.oracle.trace_file import Trace, is_trace


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="REFERENCE", help="a model, or a trace")
    parser.add_argument("trace", metavar="OTHER", help="a trace, see docs/traces.md")
    parser.add_argument(
        "--arithmetic", metavar="NAME", help="how the other engine rounds: float32, bfloat16, "
        "llama.cpp or a .toml file; default: as the trace says",
    )  # fmt: skip
    parser.add_argument(
        "--run", action="store_true", help="compare with a run from the tokens on, and do not "
        "replay each operation from what was recorded before it",
    )  # fmt: skip
    parser.add_argument(
        "--replace", action="append", default=[], metavar="NAME", help="go on from the other "
        "engine's value of this name, such as layers.3.mlp.down_proj, and say whether it alone "
        "explains the logits; may be given several times",
    )  # fmt: skip
    parser.add_argument("--html", metavar="FILE", help="write a page with a heat map there")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit's XML there")
    add_json(parser)


def main(args: Namespace) -> None:
    if is_trace(args.model):
        compare_traces(args)
        return
    with ModelWeights(args.model) as weights, Trace(args.trace) as trace:
        how = arithmetic_named(args.arithmetic) if args.arithmetic else trace.how
        if args.replace:
            replacement(weights, trace, how, args)
            return
        with progress_bars() as progress:
            found = compare(weights, trace, how, not args.run, progress)
    tell(found, args)


def tell(found: Comparison, args: Namespace) -> None:
    """Print and write what was found. Raises NotConforming."""
    if args.json != "-":
        print("\n".join(lines(found)))
    for path, text in ((args.html, page), (args.junit, junit)):
        if path is not None:
            with replacing(path) as file:
                file.write(text(found).encode())
    write_json(args.json, found.as_dict())
    if found.first is not None:
        raise NotConforming


def compare_traces(args: Namespace) -> None:
    """Trace against trace: by the noise that a golden has, or else the same bits or not."""
    with Trace(args.model) as reference, Trace(args.trace) as other:
        if args.replace or args.arithmetic or args.run:
            raise FormatError(
                f"{args.model}: is a trace; --arithmetic, --run and --replace need a model"
            )
        if reference.golden:
            tell(compare_with_golden(reference, other), args)
            return
        if args.html or args.junit:
            raise FormatError(
                f"{args.model}: is no golden; --html and --junit need one, or a model"
            )
        different = first_difference(reference, other)
    if args.json != "-":
        print(
            "the bits are the same"
            if different is None
            else f"the bits differ first in {different[0]}, and in {different[1] - 1} more values; "
            "with a model or a golden as the reference it is judged whether that is noise"
        )
    first = None if different is None else different[0]
    write_json(args.json, {"conforms": first is None, "first_wrong": first})
    if first is not None:
        raise NotConforming


def replacement(weights: ModelWeights, trace: Trace, how: Arithmetic, args: Namespace) -> None:
    """--replace."""
    if args.html or args.junit or args.run:
        raise UserError("--replace goes without --html, --junit and --run")
    found = replace_values(weights, trace, how, args.replace)
    if args.json != "-":
        print(f"with {', '.join(found.names)} of the other engine in place of ours")
        for label, o in (("before", found.before), ("after", found.after)):
            print(
                f"  {label}: its logits are {o.noise:.3g} units of noise off (limit {o.limit:.2f})"
            )
        if found.before.verdict == "right":
            print("its logits conform: there is nothing to explain")
        else:
            print("this alone explains it" if found.explains else "this alone does not explain it")
    write_json(
        args.json,
        {
            "replaced": list(found.names), "noise_before": found.before.noise,
            "noise_after": found.after.noise, "explains": found.explains,
        },
    )  # fmt: skip
    if not found.explains:
        raise NotConforming
