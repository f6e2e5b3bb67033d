"""What architectures with Mamba-2 layers share."""

from ..errors import FormatError, shown
from ..fields import Fields
from ..numbers import is_number


def names(mixer: str) -> dict[str, str]:
    """{our tensor: the checkpoint's} of Mamba-2 in the module ``mixer``."""
    return {
        **{
            f"layers.{{}}.{p}.{kind}": f"{mixer}.{theirs}.{kind}"
            for p, theirs in (("in_proj", "in_proj"), ("conv", "conv1d"), ("out_proj", "out_proj"))
            for kind in ("weight", "bias")
        },
        "layers.{}.mixed_norm.weight": f"{mixer}.norm.weight",
        "layers.{}.dt_bias": f"{mixer}.dt_bias",
        "layers.{}.decay": f"{mixer}.A_log",
        "layers.{}.skip": f"{mixer}.D",
    }


def step_limits(config: Fields, key: str = "time_step_limit") -> tuple[float, float | None]:
    """``steps`` of Mamba2Config. Raises FormatError where they are no limits."""
    given = (0.0, float("inf")) if config[key] is None else config[key]
    if isinstance(given, (list, tuple)) and len(given) == 2:
        least, most = (_special(value) for value in given)
        if is_number(least, 0, 1e30) and most == float("inf"):
            return float(least), None
        if is_number(least, 0, 1e30) and is_number(most, least, 1e30):
            return float(least), float(most)
    raise FormatError(f"config: {key} is {shown(given)}, not the least and the most of a time step")


def _special(value: object) -> object:
    """A number that JSON has no word for, as transformers writes it."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return {"Infinity": float("inf")}.get(str(value["__float__"]))
    return value
