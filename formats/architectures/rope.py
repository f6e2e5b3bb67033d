"""Rotary positions as Hugging Face's configs say them, in the older form and the new."""

from ..errors import FormatError, shown
from ..fields import LARGEST, Fields, dimension, flag, number
from ..layers.rotary import ROTARY, Rotary
from .windows import LAYER_TYPES

# The config fields that describe rotary positions, with their defaults.
ROPE = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}

SMALLEST = 1e-5  # factor of rotary positions; those of published models are about 1 and more


def rope_parameters(config: Fields) -> Fields:
    """The parameters of rotary positions (a dict), which are the same in all layers.

    Those of ``rope_scaling``, the older form, where it says anything, else of ``rope_parameters``;
    what they leave out stands beside them.
    """
    for key in ("rope_scaling", "rope_parameters"):
        check_object(config[key], key)
    found = config["rope_scaling"] or config["rope_parameters"] or {}
    if kinds := found.keys() & LAYER_TYPES.keys():
        raise FormatError(f"config: rotary positions of {min(kinds)} alone are not supported")
    beside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor")}
    found = {**beside, **found}
    if config["original_max_position_embeddings"] is not None:
        found["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return found


def parameters_of_kinds(config: Fields, far: object, near: object) -> tuple[Fields, Fields]:
    """The parameters of rotary positions of layers that see all, and of those that see a window.

    far, near  their bases where they state none
    Each kind of layer has its own in ``rope_parameters``; the older ``rope_scaling`` changes those
    of layers that see all, and says its kind as ``rope_type`` only.
    """
    for key in ("rope_parameters", "rope_scaling"):
        check_object(config[key], key)
    given, found = config["rope_parameters"] or {}, []
    for kind, base in (("full_attention", far), ("sliding_attention", near)):
        check_object(given.get(kind), kind)
        own = given.get(kind) or {"rope_type": "default"}
        if kind == "full_attention":
            own = {**own, **(config["rope_scaling"] or {})}
        beside = {"rope_theta": base, "partial_rotary_factor": config["partial_rotary_factor"]}
        # transformers reads ``truncate`` from ``rope_parameters`` itself, not from the entry of a
        # layer type.
        found.append({**beside, **own, "truncate": given.get("truncate", True)})
    return found[0], found[1]


def check_object(value: object, key: str) -> None:
    """Raises FormatError where a value is neither a JSON object nor null."""
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"config: {key} is {shown(value)}, not an object")


def rotary(config: Fields, found: Fields, head_dim: int, partly: bool = False) -> Rotary:
    """The Rotary of parameters that ``rope_parameters`` found.

    partly  whether the architecture turns the part of each head that ``partial_rotary_factor``
            says; the others take no notice of it, or cannot be run with it
    """
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROTARY:
        raise FormatError(
            f"config: rotary positions of rope_type {shown(kind)} are not supported; "
            f"supported: {', '.join(ROTARY)}"
        )
    base, share = number(found, "rope_theta"), 1.0
    if base <= 1:
        raise FormatError(f"config: rope_theta is {base}, not above 1")
    if kind == "proportional":
        if partly:
            raise FormatError("config: rotary positions of rope_type proportional turn whole heads")
        return _proportional(found, base, head_dim)
    if partly or (kind != "default" and found.get("partial_rotary_factor") is not None):
        share = number(found, "partial_rotary_factor")
    if share > 1 or (share < 1 and not partly):
        raise FormatError(f"config: partial_rotary_factor {share} is not supported here")
    dim = int(head_dim * share)
    if dim % 2 or not dim:
        raise FormatError(
            f"config: {dim} values of each head (head_dim {head_dim}, partial_rotary_factor "
            f"{share}) cannot be rotary"
        )
    most = dimension(config, "max_position_embeddings")
    return Rotary(dim, base, kind, _rotary_parameters(kind, found, most, dim))


def _proportional(found: Fields, base: float, head_dim: int) -> Rotary:
    """Rotary positions of whole heads, of whose pairs only the first ones are turned."""
    found = {"partial_rotary_factor": 1.0, "factor": 1.0, **found}
    if found["partial_rotary_factor"] is None:
        found["partial_rotary_factor"] = 1.0
    share = number(found, "partial_rotary_factor", zero=True)
    if share > 1 or head_dim % 2:
        raise FormatError(
            f"config: partial_rotary_factor {share} of heads of {head_dim} is not supported here"
        )
    turned = int(share * head_dim // 2)
    parameters = {"turned": turned, "factor": _factor(found, "factor")}
    return Rotary(head_dim, base, "proportional", parameters)


def _rotary_parameters(kind: str, found: Fields, most: int, dim: int) -> Fields:
    """The parameters that a kind of rotary positions has. Raises FormatError."""
    known: Fields = {"max_position_embeddings": most}
    if kind in ("llama3", "yarn", "longrope"):
        original = dimension(found, "original_max_position_embeddings", most)
        if original < 2:
            raise FormatError(f"config: original_max_position_embeddings is {original}")
        known["original_max_position_embeddings"] = original
    if kind in ("yarn", "longrope") and found.get("factor") is None:
        found = {**found, "factor": most / known["original_max_position_embeddings"]}
        known["factor"] = _factor(found, "factor")
    elif kind != "default":
        known["factor"] = _factor(found, "factor")
    if kind == "llama3":
        low, high = number(found, "low_freq_factor"), number(found, "high_freq_factor")
        if high <= low:
            raise FormatError(f"config: high_freq_factor {high} is not above low_freq_factor {low}")
        known.update(low_freq_factor=low, high_freq_factor=high)
    if kind == "longrope":
        known.update({key: _factors(found, key, dim) for key in ("short_factor", "long_factor")})
    if kind in ("yarn", "longrope") and found.get("attention_factor") is not None:
        known["attention_factor"] = number(found, "attention_factor")
    if kind == "yarn":
        known["truncate"] = flag({"truncate": True, **found}, "truncate")
        for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if found.get(key) is not None:
                known[key] = number(found, key, zero=True)
    return known


def _factors(found: Fields, key: str, dim: int) -> list[float]:
    values = found.get(key)
    if not isinstance(values, list) or len(values) != dim // 2:
        raise FormatError(f"config: {key} is not a list of {dim // 2} numbers")
    return [_factor({key: value}, key) for value in values]


def _factor(found: Fields, key: str) -> float:
    """What angles are divided by: less than SMALLEST would turn a head by millions of radians."""
    factor = number(found, key)
    if factor < SMALLEST:
        raise FormatError(f"config: {key} {factor} of the rotary positions is below {SMALLEST}")
    return factor


def longest(rotary: Rotary, most: int) -> int:
    """How many positions there are: dynamic rotary positions are made to go on behind ``most``."""
    if rotary.kind == "dynamic":
        most = min(int(most * max(1.0, rotary.parameters["factor"])), LARGEST - 1)
    return most
