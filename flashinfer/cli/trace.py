"""Write every intermediate value of a run to a safetensors file, or summaries of them.

The run is ours, or that of another engine: llama.cpp's of a GGUF file, transformers' of a
checkpoint, or any other's whose values lie in a file already.
"""

import sys
from argparse import ArgumentParser, Namespace

from flashinfer.cli.common import add_json, positions, progress_bars, write_json
from flashinfer.cli.model_options import add_model_arguments, open_model
from flashinfer.cli.prompt import add_text_arguments, ids_of_text
from flashinfer.formats.errors import UserError
from flashinfer.oracle.trace_file import Trace

ENGINES = ("flashinfer", "llama.cpp", "transformers")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a bundle; of another engine its own file")
    add_text_arguments(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN",
        help="values whose names match, such as '*.mlp*' or logits; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--positions", type=positions, metavar="LIST", help="of these tokens, such as 0,5,10-20"
    )
    parser.add_argument(
        "--summary", action="store_true",
        help="of each value a digest, moments, extremes and a sample: kilobytes",
    )  # fmt: skip
    parser.add_argument(
        "--golden", metavar="ARITHMETIC", help="a summary that judges other engines without the "
        "model: computed in float64, with the noise of one that rounds so (float32, llama.cpp, "
        "...); takes --tokens",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=ENGINES, default="flashinfer",
        help="which one runs; llama.cpp needs llama-cpp-python, transformers needs torch",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="source", metavar="FILE", help="run nothing: the values lie in this .npz, "
        ".npy or .safetensors file",
    )  # fmt: skip
    parser.add_argument(
        "--map", dest="file_map", metavar="FILE", help="a .toml file that says what --from's "
        "arrays are called here; see docs/traces.md",
    )  # fmt: skip
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    if args.source is not None:
        bring(args)
    elif args.golden is not None:
        make_golden(args)
    elif args.engine == "flashinfer":
        trace_own(args)
    else:
        trace_other(args)
    with Trace(args.output) as written:
        figures = {
            "engine": written.engine,
            "arithmetic": written.arithmetic,
            "tokens": written.tokens.tolist(),
            "positions": written.positions.tolist(),
            "values": written.names,
            "summary": written.summaries is not None,
            "bytes": written.file.size,
        }
    write_json(args.json, figures)


def trace_own(args: Namespace) -> None:
    """--engine flashinfer."""
    from flashinfer.oracle.trace import trace

    if args.file_map is not None:
        raise UserError("--map is for --from FILE")
    ids = ids_of_text(args)
    with (
        progress_bars() as progress,
        open_model(args, args.model, len(ids), progress=progress) as model,
    ):
        trace(model, ids, args.output, args.only, args.positions, args.summary, progress)


def make_golden(args: Namespace) -> None:
    """--golden ARITHMETIC."""
    from flashinfer.oracle.arithmetic import arithmetic_named
    from flashinfer.oracle.golden import write_golden
    from flashinfer.oracle.model_weights import ModelWeights

    if args.only or args.positions or args.summary or args.file_map or args.engine != ENGINES[0]:
        raise UserError("--golden goes with --tokens and -o alone")
    if not args.tokens:
        raise UserError("--golden takes --tokens IDS")
    how = arithmetic_named(args.golden)
    with ModelWeights(args.model) as weights, progress_bars() as progress:
        write_golden(weights, args.tokens, how, args.output, progress)


def trace_other(args: Namespace) -> None:
    """--engine llama.cpp or transformers, which record all values of all tokens."""
    if args.only or args.positions or args.summary or args.file_map:
        raise UserError(f"--engine {args.engine} records everything; leave the other options out")
    if not args.tokens:
        raise UserError(f"--engine {args.engine} takes --tokens IDS")
    if args.engine == "llama.cpp":
        from flashinfer.oracle.from_llama_cpp import trace_llama_cpp

        trace_llama_cpp(args.model, args.tokens, args.output, args.threads or 1)
    else:
        from flashinfer.oracle.from_transformers import trace_transformers

        trace_transformers(args.model, args.tokens, args.output)


def bring(args: Namespace) -> None:
    """--from FILE."""
    from flashinfer.oracle.by_hand import NameMap, import_trace
    from flashinfer.oracle.model_weights import ModelWeights

    own = args.engine == ENGINES[0] and args.golden is None
    if args.only or args.positions or args.summary or not own:
        raise UserError(
            "--from takes all that the file holds; leave out --only, --positions, "
            "--summary, --golden and --engine"
        )
    names = None if args.file_map is None else NameMap(args.file_map)
    with ModelWeights(args.model) as weights:
        left_out = import_trace(args.source, weights, args.output, names, args.tokens)
    if left_out:
        some = ", ".join(left_out[:3])
        print(f"flashinfer: {len(left_out)} arrays are left out: {some}", file=sys.stderr)
