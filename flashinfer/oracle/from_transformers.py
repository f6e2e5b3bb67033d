"""Traces of a transformers model: hooks on its modules, for as long as a ``with`` lasts.

with traced_transformers(model, tokens, "run.safetensors"):
    model(torch.tensor([tokens]), use_cache=False)
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.architectures import ARCHITECTURES, architecture, model_config
from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.bounded_json import JsonObject, read_json
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.errors import UserError
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.oracle.trace_file import write_trace
from flashinfer.transformer.values import ModuleNames, Value, values_of

# The attention function that tells its arguments. Names with "flash" in them are libraries' own.
ATTENTION = "traced"
# Which modules may have heads first.
OF_HEADS = ("q_norm", "k_norm", "v_norm", "q_turned", "k_turned")


@contextmanager
def traced_transformers(
    model: Any, tokens: Sequence[int], path: Path | str, config: JsonObject | None = None
) -> Iterator[dict[str, AnyArray]]:
    """While the block lasts, what the modules of ``model`` give is recorded; at its end the trace
    is written. Yields the values recorded so far, {name: (T, ...)}.

    model   a causal language model of transformers, of a supported architecture; it is called once
            in the block, with one text and without a cache of keys and values
    tokens  the ids that it is called with
    config  the model's config as in config.json; None: as the model has it
    Raises UserError where the model was not called once with these tokens.
    """
    hf_config = config or model.config.to_dict()
    described, naming = model_config(hf_config), architecture(hf_config)
    described.refuse_encoder(getattr(model, "name_or_path", "") or path)
    found: dict[str, AnyArray] = {}
    with ExitStack() as hooks:
        for value in values_of(described, naming):
            _hook(model, value, described, naming, found, hooks)
        _hook_attention(model, described, naming, found, hooks)
        hooks.callback(model.register_forward_hook(_logits_into(found)).remove)
        yield found
    rows = {len(array) for array in found.values()}
    if rows != {len(tokens)}:
        raise UserError(f"{path}: the model was not called once with the {len(tokens)} tokens")
    order = [v for v in values_of(described, naming) if v.name in found]
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    how = dtype if dtype in ("bfloat16", "float16") else "float32"
    write_trace(path, order, found, _engine(), hf_config, tokens, arithmetic=how)


def _engine() -> str:
    import torch
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def _array(x: Any) -> AnyArray:
    """A tensor (1, T, ...) or (T, ...) of one text as float32 (T, ...)."""
    x = x.detach().float().cpu().numpy()
    return np.array(x[0] if x.ndim > 2 and len(x) == 1 else x)


def _hook(
    model: Any,
    value: Value,
    config: ModelConfig,
    naming: Any,
    found: dict[str, AnyArray],
    hooks: ExitStack,
) -> None:
    """Record a value where a module gives it, or reads it."""
    path, _, what = value.name.rpartition(".")
    module = _module(model, value.name)
    if module is not None:
        take = _of_output(value, found)
    elif what == "input" and _module(model, path) is not None:
        module = _module(model, path)
        hooks.callback(
            module.register_forward_pre_hook(_of_input(value, found), with_kwargs=True).remove
        )
        return
    elif _module(model, path) is not None and value.layer is not None:
        module = _module(model, path)
        if value.key in ("choices", "choice_weights"):
            take = _of_router(value, found)
        else:
            rows = _packed_rows(value, config, naming)
            if rows is None:
                return
            take = _of_output(value, found, rows)
    else:
        return
    hooks.callback(module.register_forward_hook(take).remove)


def _module(model: Any, name: str) -> Any:
    """The module of this name, or None."""
    for part in name.split("."):
        if not hasattr(model, part) and not (part.isdecimal() and hasattr(model, "__getitem__")):
            return None
        model = model[int(part)] if part.isdecimal() else getattr(model, part)
    return model if hasattr(model, "register_forward_hook") else None


def _packed_rows(value: Value, config: ModelConfig, naming: Any) -> AnyArray | None:
    """Which columns of a packed module's output are the value, or None."""
    rows = getattr(naming, "ROWS", {})
    key = f"{value.key}_proj" if f"{value.key}_proj" in rows else value.key
    return rows[key](config.layers[value.layer or 0]) if key in rows else None


def _of_output(
    value: Value, found: dict[str, AnyArray], columns: AnyArray | None = None
) -> Callable[..., None]:
    def take(module: Any, args: Any, output: Any) -> None:
        array = _array(output[0] if isinstance(output, tuple) else output)
        if value.key in OF_HEADS and _heads_first(args[0]):
            array = array.swapaxes(0, 1)
        if value.key == "output" and array.ndim == 4:  # (hidden states, 1, T, d_model)
            array = array[:, 0].swapaxes(0, 1)
        array = array if columns is None else array.reshape(len(array), -1)[:, columns]
        found[value.name] = array.reshape(-1, *value.shape)

    return take


def _heads_first(x: Any) -> bool:
    """Whether x is (1, heads, T, head_dim), seen into (1, T, heads, head_dim)."""
    return x.ndim == 4 and x.stride(1) < x.stride(2)


def _of_input(value: Value, found: dict[str, AnyArray]) -> Callable[..., None]:
    def take(module: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        array = _array(x)
        if value.key in OF_HEADS and _heads_first(x):
            array = array.swapaxes(0, 1)
        found[value.name] = array.reshape(-1, *value.shape)

    return take


def _of_router(value: Value, found: dict[str, AnyArray]) -> Callable[..., None]:
    """Routers give (logits, weights, choices)."""

    def take(module: Any, args: Any, output: Any) -> None:
        if not isinstance(output, tuple) or len(output) < 3:
            return
        chosen = output[2].detach().cpu().numpy()
        weights = output[1].detach().float().cpu().numpy()
        if weights.shape != chosen.shape:
            weights = np.take_along_axis(weights, chosen, axis=1)
        rows = chosen.astype(np.int32) if value.key == "choices" else weights
        found[value.name] = rows.reshape(-1, *value.shape)

    return take


def _logits_into(found: dict[str, AnyArray]) -> Callable[..., None]:
    def take(module: Any, args: Any, output: Any) -> None:
        found["logits"] = _array(output.logits)

    return take


def _hook_attention(
    model: Any, config: ModelConfig, naming: Any, found: dict[str, AnyArray], hooks: ExitStack
) -> None:
    """Let attention go through a function that records queries and keys after their positions, and
    the largest scores. Models whose attention cannot be exchanged record neither."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask
    except ImportError:
        return
    names = {module: name for name, module in model.named_modules()}
    orders, values = _orders_of_heads(config, naming), _compared(config, naming)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        name = names[module]
        q, k = (np.array(x.detach().float().cpu().numpy()[0].swapaxes(0, 1)) for x in (query, key))
        order = orders.get(name, slice(None))
        for value_name, x in zip(values.get(name, ()), (q, k), strict=False):
            found[value_name] = x[..., order]
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, mask, **options)

    before = model.config._attn_implementation
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    try:
        model.set_attn_implementation(ATTENTION)
    except (AttributeError, ValueError):
        return
    hooks.callback(model.set_attn_implementation, before)


def _compared(config: ModelConfig, naming: Any) -> dict[str, tuple[str, str]]:
    """{attention module: the names of the queries and keys that it makes scores of}; those of other
    kinds of mixers are not as ours."""
    names, found = ModuleNames(config, naming), {}
    for number, layer in enumerate(config.layers):
        if not isinstance(layer.mixer, AttentionConfig):
            continue
        name, a = names.attention(number), layer.attention
        found[name] = f"{name}.q_turned", f"{name}.k_turned"
        if a.qk_norm and a.qk_norm_after_rotary:
            q, k = (names.of(f"layers.{{}}.{p}_norm.weight", number) for p in "qk")
            found[name] = q, k
    return found


def _orders_of_heads(config: ModelConfig, naming: Any) -> dict[str, AnyArray]:
    """{attention module: the order in which we have the values of its heads}, of models whose
    projections have their rows in another one."""
    rows, names = getattr(naming, "ROWS", {}).get("q_proj"), ModuleNames(config, naming)
    if rows is None or names.of("layers.{}.q_proj.weight") == names.of("layers.{}.k_proj.weight"):
        return {}  # the heads of a packed projection keep their order
    return {
        names.attention(number): rows(layer)[: layer.attention.head_dim]
        for number, layer in enumerate(config.layers)
        if isinstance(layer.mixer, AttentionConfig)
    }


def trace_transformers(
    folder: Path | str, tokens: Sequence[int], path: Path | str
) -> dict[str, AnyArray]:
    """Run ``tokens`` with transformers, in float32, and write the trace to ``path``; returns
    {name: (T, ...)}. Raises UserError where transformers is missing or cannot load the checkpoint.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError(
            f"{folder}: tracing transformers needs: pip install torch transformers"
        ) from None
    config = read_json(Path(folder) / "config.json")
    if str(config.get("model_type")) in ARCHITECTURES:
        model_config(config).refuse_encoder(folder)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.eval()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder}: transformers cannot load it: {reason}") from None
    with torch.no_grad(), traced_transformers(model, tokens, path, config) as found:
        model(torch.tensor([list(tokens)]), use_cache=False)
    return found
