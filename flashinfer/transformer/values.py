"""The intermediate values of a run: which there are, in their order, and how they are named.

A value is what a module of Hugging Face's model gives, and has that module's name; or it is what
the module reads, and has the name and ``.input``; or no module gives it, and it has a name of its
own beside the module's that it belongs to. docs/traces.md lists them.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from flashinfer.formats.arrays import AnyArray
from flashinfer.formats.config import ModelConfig
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.delta_net import DeltaNetConfig
from flashinfer.formats.layers.ffn import BRANCH_NORMS, FFNConfig
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.formats.layers.layer import LayerConfig
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.formats.layers.mixer import MixerConfig
from flashinfer.formats.layers.per_layer_input import PerLayerInputConfig
from flashinfer.formats.layers.short_conv import ShortConvConfig
from flashinfer.formats.sources.names import number_there
from flashinfer.paper.interfaces import Columns


class Value(NamedTuple):
    """One value of a run.

    key     what the engine calls it; layer: of which layer, None: of the whole model
    name    what traces call it
    shape   for each token
    dtype   safetensors' name of it: F32, I32, or U8 for bits, eight to a byte, the lowest first
    """

    key: str
    layer: int | None
    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"


class TraceTap(Protocol):
    """Is told the values of a run; see ``Model.trace``."""

    def __call__(self, layer: int | None, first: int, **values: AnyArray | Columns) -> None: ...


def widest(config: ModelConfig) -> int:
    """The numbers of the largest value of a layer, for each token."""
    return max(
        config.hidden_states * config.hidden_size,
        *(0 if layer.ffn.router else layer.ffn.neurons for layer in config.layers),
    )


def values_of(config: ModelConfig, naming: Any) -> list[Value]:
    """All values of a model's run, in the order in which they are computed.

    naming  the architecture's module (formats/architectures)
    """
    names = ModuleNames(config, naming)
    embedded = f"{names.layer(0, last=False)}.input"
    if config.hidden_states > 1:  # which the first layer reads
        embedded = names.of("embed_tokens.weight")
    found = [Value("embedded", None, embedded, (config.hidden_size,))]
    for number, layer in enumerate(config.layers):
        found += _of_layer(layer, number, names)
    if config.final_norm:
        found.append(
            Value("final_norm", None, names.of("final_norm.weight"), (config.hidden_size,))
        )
    if config.embedding_size != config.hidden_size:
        projected = (config.embedding_size,)
        found.append(Value("projected", None, names.of("project_out.weight"), projected))
    if config.logit_scale != 1 or config.logit_cap is not None:
        found.append(Value("head", None, "lm_head", (config.vocab_size,)))
    return [*found, Value("logits", None, "logits", (config.vocab_size,))]


def _of_layer(layer: LayerConfig, number: int, names: "ModuleNames") -> Iterator[Value]:
    here, d = names.layer(number), (layer.mixer.hidden_size,)

    def value(key: str, name: str, shape: tuple[int, ...], dtype: str = "F32") -> Value:
        return Value(key, number, name, shape, dtype)

    if layer.ffn.router and layer.ffn.router.early:
        yield from _of_router(layer.ffn, number, names)
    if layer.altup is not None:
        name = names.norm("attention_norm", number)
        yield value("altup_active", f"{name}.input", d)
    if layer.norm_before and not layer.bare_input:
        yield value("attention_norm", names.norm("attention_norm", number), d)
    yield from OF_MIXERS[type(layer.mixer)](layer.mixer, number, names)
    if layer.norm_after:
        name = names.norm("attention_after_norm", number)
        yield value("attention_after_norm", name, d)
    if layer.laurel_rank:
        for part, width in (("left", (layer.laurel_rank,)), ("right", d), ("norm", d)):
            name = names.of(f"layers.{{}}.laurel.{part}.weight", number)
            yield value(f"laurel_{part}", name, width)
    if not layer.norm_before:
        yield value("attention_norm", names.norm("attention_norm", number), d)
    elif not layer.parallel and layer.ffn.neurons:
        reader = names.block(number) if layer.bare_input else names.norm("ffn_norm", number)
        yield value("attended", f"{reader}.input", d)
    if "ffn_norm" in layer.norms() and layer.norm_before:
        yield value("ffn_norm", names.norm("ffn_norm", number), d)
    if layer.ffn.neurons:
        yield from _of_ffn(layer.ffn, number, names)
    if layer.norm_after:
        yield value("ffn_after_norm", names.norm("ffn_after_norm", number), d)
    if layer.altup is not None:
        yield value("computed", f"{here}.computed", d)
    if layer.per_layer is not None:
        yield from _of_per_layer_input(layer.per_layer, number, names)
    if layer.output_scale:
        yield value("unscaled", f"{here}.unscaled", d)
    states = () if layer.altup is None else (layer.altup.states,)
    yield value("output", here, (*states, *d))


def _of_per_layer_input(
    block: PerLayerInputConfig, number: int, names: "ModuleNames"
) -> Iterator[Value]:
    d, size = (block.hidden_size,), (block.size,)
    gate, proj = (names.of(f"layers.{{}}.per_layer.{p}.weight", number) for p in ("gate", "proj"))
    yield Value("ffn_added", number, f"{gate}.input", d)
    yield Value("per_layer_own", number, f"{names.layer(number)}.per_layer_input", size)
    yield Value("per_layer_gate", number, gate, size)
    yield Value("per_layer_read", number, f"{proj}.input", size)
    yield Value("per_layer", number, proj, d)
    norm = names.of("layers.{}.per_layer.after_norm.weight", number)
    yield Value("per_layer_norm", number, norm, d)


def _of_attention(a: AttentionConfig, number: int, names: "ModuleNames") -> Iterator[Value]:
    attention = names.attention(number)
    shapes = a.projections()
    for p in (p for p in "qkv" if p in shapes):
        yield Value(p, number, names.projection(p, number), (shapes[p][0],))
    heads = {"q": a.num_attention_heads, "k": a.num_key_value_heads}
    heads = {p: n for p, n in heads.items() if p in shapes}
    normed = [
        Value(
            f"{p}_norm", number, names.of(f"layers.{{}}.{p}_norm.weight", number), (n, a.head_dim)
        )
        for p, n in heads.items()
        if a.qk_norm
    ]
    turned = [
        Value(f"{p}_turned", number, f"{attention}.{p}_turned", (n, a.head_dim))
        for p, n in heads.items()
        if a.rotary
    ]
    yield from [*turned, *normed] if a.qk_norm_after_rotary else [*normed, *turned]
    if a.v_norm:
        shape = (a.num_key_value_heads, a.head_dim)
        yield Value("v_norm", number, f"{attention}.v_norm", shape)
    o = names.projection("o", number)
    yield Value("scores_max", number, f"{attention}.scores_max", (a.num_attention_heads,))
    width = (a.projections()["o"][1],)
    if a.heads_norm:
        norm = names.of("layers.{}.heads_norm.weight", number)
        yield Value("heads", number, f"{norm}.input", width)
        yield Value("heads_norm", number, norm, width)
    elif a.output_gate:
        yield Value("heads", number, f"{attention}.heads", width)
        yield Value("g", number, names.projection("g", number), width)
        yield Value("gated", number, f"{o}.input", width)
    else:
        yield Value("heads", number, f"{o}.input", width)
    yield Value("o", number, o, (a.hidden_size,))


def _of_latent_attention(
    a: LatentAttentionConfig, number: int, names: "ModuleNames"
) -> Iterator[Value]:
    shapes, attention = a.projections(), names.attention(number)

    def product(key: str, p: str) -> Value:
        return Value(key, number, names.projection(p, number), shapes[f"{p}_proj"][:1])

    def norm(p: str, width: int) -> Value:
        name = names.of(f"layers.{{}}.{p}_a_norm.weight", number)
        return Value(f"{p}_a_norm", number, name, (width,))

    if a.q_lora_rank is None:
        yield product("q", "q")
    else:
        yield product("q_a", "q_a")
        yield norm("q", a.q_lora_rank)
        yield product("q", "q_b")
    yield Value(
        "q_turned", number, f"{attention}.q_turned", (a.num_attention_heads, a.qk_rope_head_dim)
    )
    yield product("kv_a", "kv_a")
    yield norm("kv", a.kv_lora_rank)
    yield Value("k_turned", number, f"{attention}.k_turned", (1, a.qk_rope_head_dim))
    yield Value("scores_max", number, f"{attention}.scores_max", (a.num_attention_heads,))
    o = names.projection("o", number)
    yield Value("heads", number, f"{o}.input", shapes["o_proj"][1:])
    yield Value("o", number, o, shapes["o_proj"][:1])


def _of_short_conv(c: ShortConvConfig, number: int, names: "ModuleNames") -> Iterator[Value]:
    d = (c.hidden_size,)
    in_proj, out_proj = (names.of(f"layers.{{}}.{p}_proj.weight", number) for p in ("in", "out"))
    yield Value("in_proj", number, in_proj, (3 * c.hidden_size,))
    yield Value("mixed", number, f"{out_proj}.input", d)
    yield Value("o", number, out_proj, d)


def _of_delta_net(c: DeltaNetConfig, number: int, names: "ModuleNames") -> Iterator[Value]:
    width = (c.value_heads * c.value_dim,)
    for key, p in (("in_proj", "in"), ("z", "z"), ("a", "a"), ("b", "b")):
        name = names.projection(p, number)
        yield Value(key, number, name, (c.projections()[p][0],))
    out_proj = names.projection("out", number)
    yield Value("read", number, f"{names.of('layers.{}.gated.weight', number)}.input", width)
    yield Value("mixed", number, f"{out_proj}.input", width)
    yield Value("o", number, out_proj, (c.hidden_size,))


def _of_mamba2(c: Mamba2Config, number: int, names: "ModuleNames") -> Iterator[Value]:
    in_proj, out_proj = (names.of(f"layers.{{}}.{p}_proj.weight", number) for p in ("in", "out"))
    norm = names.of("layers.{}.mixed_norm.weight", number)
    yield Value("in_proj", number, in_proj, (c.projected,))
    yield Value("scanned", number, f"{norm}.input", (c.width,))
    yield Value("mixed", number, norm, (c.width,))
    yield Value("o", number, out_proj, (c.hidden_size,))


# What a mixer's run gives, by the class of its config.
OF_MIXERS: dict[type[MixerConfig], Callable[[Any, int, "ModuleNames"], Iterator[Value]]] = {
    AttentionConfig: _of_attention,
    LatentAttentionConfig: _of_latent_attention,
    ShortConvConfig: _of_short_conv,
    DeltaNetConfig: _of_delta_net,
    Mamba2Config: _of_mamba2,
}


def _of_ffn(ffn: FFNConfig, number: int, names: "ModuleNames") -> Iterator[Value]:
    d = (ffn.hidden_size,)
    if not ffn.router:
        down = names.ffn("down", number)
        if ffn.gated:
            yield Value("gate", number, names.ffn("gate", number), (ffn.d_ffn,))
        yield Value("up", number, names.ffn("up", number), (ffn.d_ffn,))
        yield Value("predicted", number, f"{down}.predicted", (-(-ffn.d_ffn // 8),), "U8")
        norm = names.of("layers.{}.activations_norm.weight", number)
        reader = norm if ffn.activations_norm else down
        yield Value("activations", number, f"{reader}.input", (ffn.d_ffn,))
        yield Value("active", number, f"{down}.active", (-(-ffn.d_ffn // 8),), "U8")
        if ffn.activations_norm:
            yield Value("activations_norm", number, norm, (ffn.d_ffn,))
        yield Value("ffn", number, down, d)
        return
    block = names.block(number)
    experts = f"{block}.experts"
    if ffn.shared_d_ffn:
        shared = names.of("layers.{}.shared.down.weight", number).rpartition(".")[0]
        if not shared.startswith(f"{block}."):  # no module has both
            experts, block = block, f"{names.layer(number)}.ffn"
        yield Value("shared", number, shared, d)
    if ffn.shared_gated:
        gate = names.of("layers.{}.shared.weigh.weight", number)
        yield Value("shared_gate", number, gate, (1,))
    if not ffn.router.early:
        yield from _of_router(ffn, number, names)
    if ffn.branch_norm is None:
        yield Value("experts", number, experts, d)
        yield Value("ffn", number, block, d)
        return
    own = {norm: names.of(f"layers.{{}}.{norm}.weight", number) for norm in BRANCH_NORMS}
    yield Value("shared_after_norm", number, own["shared_after_norm"], d)
    yield Value("experts_norm", number, own["experts_norm"], d)
    yield Value("experts", number, experts, d)
    yield Value("experts_after_norm", number, own["experts_after_norm"], d)
    yield Value("ffn", number, f"{names.norm('ffn_after_norm', number)}.input", d)


def _of_router(ffn: FFNConfig, number: int, names: "ModuleNames") -> Iterator[Value]:
    assert ffn.router is not None
    router, chosen = names.router(number), (ffn.router.experts_per_token,)
    yield Value("router", number, router, (ffn.experts,))
    router = router.removesuffix(".proj")
    yield Value("choices", number, f"{router}.choices", chosen, "I32")
    yield Value("choice_weights", number, f"{router}.weights", chosen)


class ModuleNames:
    """The names of Hugging Face's modules, found by the names of their weights."""

    def __init__(self, config: ModelConfig, naming: Any) -> None:
        self.config, self.naming = config, naming

    def of(self, template: str, number: int | None = None, last: bool = True) -> str:
        """The module of one of our tensors: "layers.{}.q_proj.weight" -> "...self_attn.q_proj".

        last  of several names, the newest one; else the first
        """
        named = self.naming.NAMES.get(template, template).split("|")[-1 if last else 0]
        if number is not None:
            number = number_there(self.naming, self.config, template, number)
        return named.replace("{}", str(number)).removesuffix(".weight")

    def layer(self, number: int, last: bool = True) -> str:
        """The module of a layer; of several, one for each block, the last one or the first."""
        has_ffn = bool(self.config.layers[number].ffn.neurons)
        of = "layers.{}.ffn_norm" if last and has_ffn else "layers.{}.attention_norm"
        name = self.naming.NAMES["layers.{}.attention_norm.weight"].split("|")[-1]
        return name.partition("{}")[0] + str(number_there(self.naming, self.config, of, number))

    def norm(self, kind: str, number: int) -> str:
        """The module of a layer's norm. Falcon has an older name for one that is not beside another
        one, which the module keeps."""
        layer = self.config.layers[number]
        two = layer.parallel and not layer.shared_norm
        last = two or bool(getattr(self.naming, "BLOCKS", False))
        return self.of(f"layers.{{}}.{kind}.weight", number, last=last)

    def projection(self, p: str, number: int) -> str:
        """The module of q, k, v or o; of a packed one, with the part's name behind it."""
        name = self.of(f"layers.{{}}.{p}_proj.weight", number)
        return f"{name}.{p}" if f"{p}_proj" in getattr(self.naming, "ROWS", {}) else name

    def attention(self, number: int) -> str:
        """The module of a layer's attention."""
        return self.of("layers.{}.o_proj.weight", number).rpartition(".")[0]

    def ffn(self, part: str, number: int) -> str:
        """The module of a dense FFN's gate, up or down; of a packed one, with the part's name."""
        parts = getattr(self.naming, "DENSE_FFN", self.naming.FFN)
        there = number_there(self.naming, self.config, "layers.{}.ffn", number)
        name = parts[part].split("|")[-1].replace("{}", str(there)).removesuffix(".weight")
        packed = part in getattr(self.naming, "ROWS", {})
        return f"{name}.{part}" if packed else name

    def router(self, number: int) -> str:
        """The module of a mixture's router that gives its logits; what chooses is Hunyuan's without
        ".wg" and Gemma 4's without ".proj"."""
        return self.of("layers.{}.router.weight", number).removesuffix(".wg")

    def block(self, number: int) -> str:
        """The module of a feed-forward block: of a mixture the router and experts together."""
        router = self.config.layers[number].ffn.router
        part = self.router(number).removesuffix(".proj") if router else self.ffn("up", number)
        return part.rpartition(".")[0]
