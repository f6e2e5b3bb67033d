"""Show what a bundle holds, what stays in DRAM and what streams, and its calibration."""

from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from flashinfer.cli.common import add_json, open_bundle, positive, write_json
from flashinfer.cli.model_options import add_model_arguments
from flashinfer.cli.plan import bytes_by_role, print_memory
from flashinfer.cli.plan_table import prepared
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.calibration import Calibration, LayerCalibration
from flashinfer.formats.bundle.reader import Bundle
from flashinfer.formats.errors import printable
from flashinfer.formats.layers.ffn import FFNConfig
from flashinfer.plan.plan import Plan, unit_name


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a bundle, such as x.flash")
    parser.add_argument("-c", "--ctx-size", type=positive, metavar="N", help="tokens (up to 1024)")
    add_model_arguments(parser)
    add_json(parser)


def main(args: Namespace) -> None:
    with open_bundle(args.model, args.memory) as bundle:
        figures = describe(bundle)
        plan = prepared(bundle, args).plan
        figures["plan"] = asdict(plan)
        if args.json != "-":
            print_description(figures, plan, bundle)
    write_json(args.json, figures)


def describe(bundle: Bundle) -> JsonObject:
    """The figures of a bundle, for people and --json."""
    layers = range(bundle.config.num_hidden_layers)
    return {
        "model": str(bundle.path),
        "bytes": bundle.nbytes,
        "number_format": bundle.ffn_formats,
        "config": asdict(bundle.config),
        "source": bundle.source,
        "bytes_by_role": bytes_by_role(bundle),
        "bundle_bytes": [bundle.bundles(layer).row_bytes for layer in layers],
        "unit_bytes": [bundle.unit_bytes(layer) for layer in layers],
        "layout": "coactivation" if bundle.has_layout else "trained",
        "calibration": bundle.calibration and bundle.calibration.as_json(),
    }


def print_description(figures: JsonObject, plan: Plan, bundle: Bundle) -> None:
    """The figures, for people."""
    config = bundle.config
    neurons = by_layers(described(layer.ffn) for layer in config.layers)
    heads = by_layers(layer.mixer.described() for layer in config.layers)
    print(
        f"{printable(figures['model'])}: {figures['bytes'] / 1e6:,.1f} MB, "
        f"{figures['number_format']}{in_other_files(bundle)}\n"
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
        f"{neurons}, {heads}, {config.vocab_size} tokens, "
        f"positions up to {config.max_position_embeddings}\n"
    )
    print_memory(plan, figures["bytes_by_role"], plan.kv_flash_bytes(bundle))
    window = plan.window or plan.affords
    sizes = zip(config.layers, figures["unit_bytes"], strict=True)
    chosen = {size for layer, size in sizes if plan.chooses(layer.ffn)}
    chosen = chosen or {figures["unit_bytes"][0]}
    unit_bytes = " or ".join(f"{size:,}" for size in sorted(chosen))
    unit = unit_name(plan.mode, config)
    print(
        f"\nneurons: {plan.mode}; each {unit} is {unit_bytes} bytes; cache: {plan.policy}"
        + (f", slots for a window of {window} tokens" if window else "")
    )
    if bundle.has_layout:
        print("layout: coactivation, neurons lie beside those that they fire with")
    calibration = bundle.calibration
    if config.encoder:
        print("an encoder: flashinfer encode gives the vectors of texts")
    elif calibration is None and config.mixture and not config.sparse:
        print("calibration: none; flashinfer calibrate finds which experts a text uses")
    elif calibration is None and config.needs_all:
        print("calibration: none; its feed-forward networks are always used whole")
    elif calibration is None and not config.sparse:
        print(
            f"calibration: none; {config.activations} leaves no neuron silent, flashinfer "
            "calibrate --target-sparsity SHARE takes some as silent"
        )
    elif calibration is None:
        print("calibration: none; flashinfer calibrate finds which neurons fire")
    else:
        print_calibration(calibration)


def in_other_files(bundle: Bundle) -> str:
    """Where a companion has its weights, for people; "" of another bundle."""
    if not bundle.in_place.files:
        return ""
    first, *others = (printable(file.name) for file in bundle.in_place.files)
    more = f" and {len(others)} others" if others else ""
    return f", {(bundle.nbytes - bundle.file.size) / 1e6:,.1f} MB of it in {first}{more}"


def described(ffn: FFNConfig) -> str:
    """A layer's neurons and experts, for people."""
    if not ffn.neurons:
        return "no neurons a layer"
    if not ffn.router:
        return f"{ffn.neurons} neurons a layer"
    return (
        f"{ffn.neurons} neurons a layer in {ffn.experts} experts, "
        f"{ffn.router.experts_per_token} of them a token"
    )


def by_layers(descriptions: Iterable[str]) -> str:
    """What all layers are, or what how many of them are."""
    counts = Counter(descriptions)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(
        f"{what} ({n} {'layer' if n == 1 else 'layers'})" for what, n in counts.items()
    )


def print_calibration(calibration: Calibration) -> None:
    """The table of ``calibrate``: one line per layer."""
    if sparsity := calibration.sparsity:
        print(
            f"\nthresholds, in force with --neurons predicted: {100 * sparsity.target:.0f} % of "
            f"the neurons taken as silent ({sparsity.method})"
        )
    text, tokens = printable(calibration.text), printable(calibration.tokens)
    print(f"\ncalibrated on {text[:200]}: {tokens[:20]} tokens")
    if any(layer.uses is not None for layer in calibration.recorded):
        print_routing(calibration)
        return
    print("layer   active %  predicted %  missed %   guessed early %   rank   window of 5: neurons")
    for number, layer in enumerate(calibration.layers):
        if layer is not None:
            print(
                f"{number:5}   {100 * layer.active:8.2f}  {100 * layer.predicted:11.2f}  "
                f"{100 * layer.missed:8.2f}   {early(layer):>15}  {layer.rank:5}   "
                f"{layer.window_rows[4]:10.0f}"
            )


def early(layer: LayerCalibration) -> str:
    """The per cent of the units that a layer uses that are guessed one layer early, or ""."""
    return f"{100 * layer.guessed:.1f}" if layer.guessed else ""


def print_routing(calibration: Calibration) -> None:
    """The same table for a mixture of experts."""
    print("layer   experts a token   most used quarter %   guessed early %   window of 5: experts")
    for number, layer in enumerate(calibration.layers):
        if layer is not None and layer.uses is not None:
            uses = sorted(layer.uses, reverse=True)
            most = sum(uses[: len(uses) // 4]) / max(1e-9, sum(uses))
            print(
                f"{number:5}   {sum(uses):15.2f}   {100 * most:19.1f}   {early(layer):>15}   "
                f"{layer.window_rows[4]:17.1f}"
            )
