"""Each operation of a model recomputed in float64 from what another engine recorded.

So errors do not add up along the run, and an operation that is wrong stands alone. What an engine
did not record is computed from what it did, with the noise that this adds, back to the tokens where
nothing was recorded: then it is the run as a whole that is computed.
"""

from collections.abc import Callable, Mapping

import numpy as np

from flashinfer.formats.arrays import AnyArray, Float64Array, Int64Array
from flashinfer.formats.layers.attention import AttentionConfig
from flashinfer.formats.layers.delta_net import DeltaNetConfig
from flashinfer.formats.layers.latent_attention import LatentAttentionConfig
from flashinfer.formats.layers.mamba2 import Mamba2Config
from flashinfer.oracle import altup, attending, delta_nets, known, latent, mixing, routing
from flashinfer.oracle.arithmetic import Arithmetic
from flashinfer.oracle.functions import activation, sigmoid
from flashinfer.oracle.known import Known
from flashinfer.oracle.model_weights import ModelWeights
from flashinfer.transformer.positions import frequencies_of, query_scales

Place = tuple[int | None, str]  # of a value: its layer, and what the engine calls it
KEPT_LAYERS = 2  # whose computed values are in memory together
LENT = ("k", "k_norm", "k_turned", "v", "v_norm")  # what later layers may read


class Unknown(Exception):
    """A value cannot be computed, as the trace holds some of the tokens only."""


class Replay:
    """The values of a run, each from those before it.

    recorded   {(layer, key): (T, ...)}: what the other engine recorded, experts ascending
    tokens     (N,): the ids of the whole text; positions (T,): those that the trace holds
    how        Arithmetic of the other engine
    context    tokens that it has room for, by which some rotary positions go; None: N
    """

    def __init__(
        self,
        weights: ModelWeights,
        recorded: Mapping[Place, AnyArray],
        tokens: Int64Array,
        positions: Int64Array,
        how: Arithmetic,
        context: int | None = None,
    ) -> None:
        self.weights, self.config, self.recorded = weights, weights.config, recorded
        self.tokens, self.positions, self.how = tokens, positions, how
        self.context = context or len(tokens)
        self.whole = len(positions) == len(tokens)
        self.known: dict[Place, Known] = {}
        self.compute_by_key: dict[str, Callable[[int], Known]] = {
            "attention_norm": self._attention_norm,
            "q": self._queries,
            "k": lambda i: self._project("k", i),
            "v": lambda i: self._project("v", i),
            "q_norm": lambda i: self._head_norm("q", i),
            "k_norm": lambda i: self._head_norm("k", i),
            "v_norm": self._values,
            "q_turned": lambda i: self._turn("q", i),
            "k_turned": lambda i: self._turn("k", i),
            "scores_max": lambda i: self._attend(i).scores_max,
            "heads": lambda i: self._attend(i).heads,
            "q_a": lambda i: self._project("q_a", i),
            "q_a_norm": lambda i: self._latent_norm("q_a", i),
            "kv_a": lambda i: self._project("kv_a", i),
            "kv_a_norm": lambda i: self._latent_norm("kv_a", i),
            "heads_norm": lambda i: self._inner_norm("heads", i),
            "g": lambda i: self._project("g", i),
            "gated": self._gated,
            "in_proj": lambda i: self._project("in", i),
            "z": lambda i: self._project("z", i),
            "a": lambda i: self._project("a", i),
            "b": lambda i: self._project("b", i),
            "read": self._read,
            "scanned": self._scanned,
            "mixed": self._mixed,
            "o": self._o,
            "attention_after_norm": lambda i: self._norm("attention_after_norm", i, "o"),
            "altup_active": self._altup_active,
            "laurel_left": lambda i: self._linear(
                f"layers.{i}.laurel.left", self.of(i, "attention_norm")
            ),
            "laurel_right": lambda i: self._linear(
                f"layers.{i}.laurel.right", self.of(i, "laurel_left")
            ),
            "laurel_norm": lambda i: self._norm_of(
                f"layers.{i}.laurel.norm", self.of(i, "laurel_right"), i
            ),
            "attended": self._attended,
            "ffn_norm": self._ffn_norm,
            "gate": lambda i: self._up("gate", i),
            "up": lambda i: self._up("up", i),
            "activations": self._activations,
            "activations_norm": lambda i: self._inner_norm("activations", i),
            "ffn": self._ffn,
            "router": self._router,
            "choice_weights": lambda i: known.stored(self.choice(i).weights, self.how),
            "experts_norm": lambda i: self._branch_norm("experts_norm", i, self.of(i, "attended")),
            "experts": self._experts,
            "experts_after_norm": lambda i: self._branch_norm(
                "experts_after_norm", i, self.of(i, "experts")
            ),
            "shared": self._shared,
            "shared_after_norm": lambda i: self._branch_norm(
                "shared_after_norm", i, self.of(i, "shared")
            ),
            "shared_gate": lambda i: self._linear(f"layers.{i}.shared.weigh", self.ffn_input(i)),
            "ffn_after_norm": lambda i: self._norm("ffn_after_norm", i, "ffn"),
            "computed": self._computed,
            "ffn_added": self._ffn_added,
            "per_layer_own": self._per_layer_own,
            "per_layer_gate": lambda i: self._linear(
                f"layers.{i}.per_layer.gate", self.of(i, "ffn_added")
            ),
            "per_layer_read": self._per_layer_read,
            "per_layer": lambda i: self._linear(
                f"layers.{i}.per_layer.proj", self.of(i, "per_layer_read")
            ),
            "per_layer_norm": self._per_layer_norm,
            "unscaled": self._unscaled,
            "output": self._output,
        }
        self.compute_of_model: dict[str, Callable[[], Known]] = {
            "embedded": self._embedded,
            "final_norm": self._final_norm,
            "projected": self._projected,
            "head": self._head,
            "logits": self._logits,
        }

    # ------------------------------------------------------------------ values

    def of(self, layer: int | None, key: str) -> Known:
        """A value as the other engine recorded it, or else as computed. Raises Unknown."""
        place = layer, key
        if place in self.recorded:
            return Known(np.asarray(self.recorded[place], dtype=np.float64))
        if place not in self.known:
            self.known[place] = self.compute(layer, key)
        return self.known[place]

    def compute(self, layer: int | None, key: str) -> Known:
        """A value from those before it, in its own shape (T, ...). Raises Unknown."""
        if layer is None:
            return self.compute_of_model[key]()
        return self.compute_by_key[key](layer)

    def forget(self, layer: int) -> None:
        """Free what was computed of the layers before the last ones, but for keys and values that
        later layers read."""
        for place in [p for p in self.known if p[0] is not None and p[0] <= layer - KEPT_LAYERS]:
            lends = getattr(self.config.layers[place[0] or 0].mixer, "lends", False)
            if not (lends and place[1] in LENT):
                del self.known[place]

    # ------------------------------------------------------------------ the model

    def _embedded(self) -> Known:
        config, rows = self.config, self.weights.rows
        h = Known(rows("embed_tokens.weight", self.tokens[self.positions]))
        if config.embedding_scale != 1:
            h = known.scale(h, config.embedding_scale, self.how)
        if "project_in.weight" in self.weights:
            h = self._linear("project_in", h)
        if config.learned_positions:
            where = self.positions + config.position_offset
            h = known.add(h, Known(rows("embed_positions.weight", where)), self.how)
        return self._norm_of("embed_norm", h) if config.embedding_norm else h

    def _final_norm(self) -> Known:
        return self._norm_of("final_norm", self._last())

    def _last(self) -> Known:
        last = self.of(len(self.config.layers) - 1, "output")
        if self.config.hidden_states == 1:
            return last
        return altup.end(last, self.weights, self.how)

    def _projected(self) -> Known:
        h = self.of(None, "final_norm") if self.config.final_norm else self._last()
        return self._linear("project_out", h)

    def _head(self) -> Known:
        if self.config.embedding_size != self.config.hidden_size:
            h = self.of(None, "projected")
        else:
            h = self.of(None, "final_norm") if self.config.final_norm else self._last()
        name = self.config.head_name
        bias = self.weights.get("lm_head.bias")
        return known.linear(h, self.weights[name], bias, self.weights.format(name), self.how)

    def _logits(self) -> Known:
        scale, cap = self.config.logit_scale, self.config.logit_cap
        if scale == 1 and cap is None:
            return self._head()
        logits = self.of(None, "head")
        if scale != 1:
            logits = known.scale(logits, scale, self.how)
        return logits if cap is None else known.capped(logits, cap, self.how)

    # ------------------------------------------------------------------ a layer

    def _before(self, i: int) -> Known:
        """What the layer before gives: a token's hidden state, or all of them."""
        if i:
            return self.of(i - 1, "output")
        embedded = self.of(None, "embedded")
        if self.config.hidden_states == 1:
            return embedded
        return altup.begin(embedded, self.weights, self.how)

    def _input(self, i: int) -> Known:
        """The hidden state that a layer's blocks read and add to."""
        if self.config.layers[i].altup is not None:
            return self.of(i, "altup_active")
        return self._before(i)

    def _predicted(self, i: int) -> Known:
        """The hidden states (T, n, d_model) that a layer predicts."""
        return altup.OfLayer(self.weights, i, self.how).predicted(self._before(i))

    def _altup_active(self, i: int) -> Known:
        config = self.config.layers[i].altup
        assert config is not None
        return altup.state(self._predicted(i), config.active)

    def _corrected(self, i: int) -> Known:
        """The hidden states (T, n, d_model) behind a layer's FFN."""
        of_layer = altup.OfLayer(self.weights, i, self.how)
        return of_layer.corrected(self._predicted(i), self.of(i, "computed"))

    def _linear(self, name: str, x: Known, rounded: bool = False) -> Known:
        weight, bias = f"{name}.weight", self.weights.get(f"{name}.bias")
        format = self.weights.format(weight)
        return known.linear(x, self.weights[weight], bias, format, self.how, rounded)

    def _rounded(self, i: int) -> bool:
        """Whether a layer's linear layers, which are those of attention and a dense FFN, round what
        they read."""
        return self.config.layers[i].ffn.rounded

    def _norm_of(self, name: str, x: Known, layer: int | None = None) -> Known:
        config = self.config.norm if layer is None else self.config.layers[layer].norm
        weight, bias = (self.weights.get(f"{name}.{part}") for part in ("weight", "bias"))
        return known.norm(x, config, weight, bias, self.how)

    def _norm(self, kind: str, i: int, key: str) -> Known:
        return self._norm_of(f"layers.{i}.{kind}", self.of(i, key), i)

    def _attention_norm(self, i: int) -> Known:
        if self.config.layers[i].norm_before:
            return self._norm_of(f"layers.{i}.attention_norm", self._input(i), i)
        both = known.add(self._input(i), self.of(i, "o"), self.how)
        return self._norm_of(f"layers.{i}.attention_norm", both, i)

    def _project(self, p: str, i: int) -> Known:
        layer = self.config.layers[i]
        before = layer.norm_before and not layer.bare_input
        x = self.of(i, "attention_norm") if before else self._input(i)
        return self._linear(f"layers.{i}.{p}_proj", x, self._rounded(i))

    def _queries(self, i: int) -> Known:
        if f"layers.{i}.q_b_proj.weight" in self.weights:
            return self._linear(f"layers.{i}.q_b_proj", self.of(i, "q_a_norm"))
        return self._project("q", i)

    def _latent_norm(self, p: str, i: int) -> Known:
        """Of latents, or of what queries are made of."""
        weight = self.weights[f"layers.{i}.{p}_norm.weight"]
        x = latent.cut(self.of(i, p), 0, len(weight))
        return known.norm(x, self._latent(i).latent_norm, weight, None, self.how)

    def _latent(self, i: int) -> LatentAttentionConfig:
        config = self.config.layers[i].mixer
        assert isinstance(config, LatentAttentionConfig)
        return config

    def _head_norm(self, p: str, i: int) -> Known:
        config = self.config.layers[i].attention
        after = config.qk_norm_after_rotary and config.rotary
        x = self.of(i, f"{p}_turned" if after else p)
        n, heads = len(x.value), x.value.size // len(x.value) // config.head_dim
        width = (heads, config.head_dim) if config.qk_norm == "head" else (heads * config.head_dim,)
        x = x.reshape(n, *width)
        weight, bias = (self.weights.get(f"layers.{i}.{p}_norm.{w}") for w in ("weight", "bias"))
        normed = known.norm(x, config.norm, weight, bias, self.how)
        return normed.reshape(n, heads, config.head_dim)

    def _projected_values(self, i: int) -> Known:
        """Values (T, key/value heads, head_dim), before they are normalised."""
        config = self.config.layers[i].attention
        x = self.of(i, "k" if config.v_of_k else "v")
        return x.reshape(len(x.value), -1, config.head_dim)

    def _values(self, i: int) -> Known:
        """The same, normalised."""
        norm = self.config.layers[i].attention.norm
        return known.norm(self._projected_values(i), norm, None, None, self.how)

    def _attended_values(self, i: int) -> Known:
        """The values that heads take sums of."""
        if self.config.layers[i].attention.v_norm:
            return self.of(i, "v_norm")
        return self._projected_values(i)

    def _before_turning(self, p: str, i: int) -> Known:
        config = self.config.layers[i].attention
        normed = config.qk_norm and not config.qk_norm_after_rotary
        x = self.of(i, f"{p}_norm" if normed else p)
        return x.reshape(len(x.value), -1, config.head_dim)

    def _compared(self, p: str, i: int) -> Known:
        """The queries or keys that scores are made of."""
        config = self.config.layers[i].attention
        if config.qk_norm and config.qk_norm_after_rotary:
            return self.of(i, f"{p}_norm")
        return self.of(i, f"{p}_turned") if config.rotary else self._before_turning(p, i)

    def _turn(self, p: str, i: int) -> Known:
        mixer = self.config.layers[i].mixer
        assert mixer.rotary is not None
        frequencies, scale = frequencies_of(mixer.rotary, self.context)
        if isinstance(mixer, LatentAttentionConfig):
            x = latent.turned_part(mixer, self.of(i, "q" if p == "q" else "kv_a"), p)
            return known.rotate(x, frequencies, self.positions.astype(float), scale, self.how)
        x = self._before_turning(p, i)
        x = known.rotate(x, frequencies, self.positions.astype(float), scale, self.how)
        temperature = self.config.layers[i].attention.temperature
        if p == "k" or temperature is None:
            return x
        scales = query_scales(temperature, self.positions)[:, None, None]
        return known.times(x, Known(scales), self.how)

    def _attend(self, i: int) -> attending.Attended:
        if not self.whole:
            raise Unknown
        if isinstance(self.config.layers[i].mixer, LatentAttentionConfig):
            return self._attend_latents(i)
        config = self.config.layers[i].attention
        own = i if config.memory_of is None else config.memory_of
        q, k, v = self._compared("q", i), self._compared("k", own), self._attended_values(own)
        sinks = self.weights.get(f"layers.{i}.sinks")
        shape = (len(self.positions), -1, config.head_dim)
        q, k = q.reshape(*shape), k.reshape(*shape)
        return attending.attend(config, q, k, v, sinks, self.how)

    def _attend_latents(self, i: int) -> attending.Attended:
        keys, values = (latent.of_heads(self.weights, i, p) for p in "kv")
        queries = latent.with_keys(self._latent(i), self.of(i, "q"), self.of(i, "q_turned"), keys,
                                   self.how)  # fmt: skip
        rows = latent.beside(self.of(i, "kv_a_norm").reshape(len(self.positions), 1, -1),
                             self.of(i, "k_turned"))  # fmt: skip
        return latent.attend(self._latent(i), queries, rows, values, self.how)

    def _inner_norm(self, key: str, i: int) -> Known:
        return self._norm(f"{key}_norm", i, key)

    def _projected_heads(self, i: int) -> Known:
        mixer = self.config.layers[i].mixer
        if not isinstance(mixer, AttentionConfig):
            return self.of(i, "heads")
        if mixer.output_gate:
            return self.of(i, "gated")
        return self.of(i, "heads_norm" if mixer.heads_norm else "heads")

    def _gated(self, i: int) -> Known:
        gate = known.apply(self.of(i, "g"), sigmoid, self.how)
        return known.times(self.of(i, "heads"), gate, self.how)

    def _read(self, i: int) -> Known:
        """What the heads of a gated delta net read from their states."""
        if not self.whole:
            raise Unknown
        config = self.config.layers[i].mixer
        assert isinstance(config, DeltaNetConfig)
        weights = {
            name: self.weights[f"layers.{i}.{name}"] for name in ("conv.weight", "decay", "dt_bias")
        }
        qkv, a, b = (self.of(i, key) for key in ("in_proj", "a", "b"))
        return delta_nets.delta_net(config, weights, qkv, a, b, self.how)

    def _convolution(self, i: int) -> tuple[Float64Array, Float64Array | None]:
        """The weights and biases of a mixer's convolution, which needs all tokens."""
        if not self.whole:
            raise Unknown
        name = f"layers.{i}.conv"
        return self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

    def _mixed(self, i: int) -> Known:
        """What the out projection of a mixer other than attention reads."""
        mixer, projected = self.config.layers[i].mixer, self.of(i, "in_proj")
        if isinstance(mixer, DeltaNetConfig):
            gated = self.weights[f"layers.{i}.gated.weight"]
            return delta_nets.gated(mixer, gated, self.of(i, "read"), self.of(i, "z"), self.how)
        if isinstance(mixer, Mamba2Config):
            weight, active = self.weights[f"layers.{i}.mixed_norm.weight"], activation("silu", 0.0)
            y = self.of(i, "scanned")
            return mixing.gated_norm(y, projected, mixer, weight, active, self.how)
        return mixing.short_conv(projected, *self._convolution(i), self.how)

    def _scanned(self, i: int) -> Known:
        """What a Mamba-2 reads from its state."""
        mixer, name = self.config.layers[i].mixer, f"layers.{i}"
        assert isinstance(mixer, Mamba2Config)
        bias, decay, skip = (self.weights[f"{name}.{p}"] for p in ("dt_bias", "decay", "skip"))
        conv, active = self._convolution(i), activation(mixer.activation, 0.0)
        projected = self.of(i, "in_proj")
        return mixing.scanned(projected, mixer, conv, (bias, decay, skip), active, self.how)

    def _o(self, i: int) -> Known:
        """What a layer's mixer gives."""
        if isinstance(self.config.layers[i].mixer, AttentionConfig | LatentAttentionConfig):
            heads = self._projected_heads(i)
            return self._linear(f"layers.{i}.o_proj", heads, self._rounded(i))
        return self._linear(f"layers.{i}.out_proj", self.of(i, "mixed"))

    def _attention_output(self, i: int) -> Known:
        after = self.config.layers[i].norm_after
        return self.of(i, "attention_after_norm" if after else "o")

    def _attended(self, i: int) -> Known:
        scale = self.config.layers[i].residual_scale
        if not self.config.layers[i].laurel_rank:
            return known.add(self._input(i), self._attention_output(i), self.how, scale)
        parts = [self._input(i), self._attention_output(i)]
        parts += [self.of(i, "attention_norm"), self.of(i, "laurel_norm")]
        return known.scale(known.total(parts, self.how), 0.5**0.5, self.how)

    def _ffn_norm(self, i: int) -> Known:
        parallel = self.config.layers[i].parallel
        x = self._input(i) if parallel else self.of(i, "attended")
        return self._norm_of(f"layers.{i}.ffn_norm", x, i)

    def ffn_input(self, i: int) -> Known:
        """What a layer's FFN reads (T, d_model)."""
        layer = self.config.layers[i]
        if not layer.norm_before or layer.shared_norm:
            return self.of(i, "attention_norm")
        return self.of(i, "attended" if layer.bare_input else "ffn_norm")

    def _router(self, i: int) -> Known:
        """The logits of a layer's router."""
        router, name = self.config.layers[i].ffn.router, f"layers.{i}.router"
        assert router is not None
        if router.norm is None:
            return self._linear(name, self._input(i) if router.early else self.ffn_input(i))
        weight = self.weights[f"{name}_norm.weight"]
        x = known.norm(self.of(i, "attended"), router.norm, weight, None, self.how)
        return known.scale(self._linear(name, x), self.config.hidden_size**-0.5, self.how)

    def _branch_norm(self, name: str, i: int, x: Known) -> Known:
        config = self.config.layers[i].ffn.branch_norm
        assert config is not None
        weight = self.weights.get(f"layers.{i}.{name}.weight")
        return known.norm(x, config, weight, None, self.how)

    def _output(self, i: int) -> Known:
        if self.config.layers[i].altup is not None:
            states, added = self._corrected(i), self.of(i, "per_layer_norm")
            n = states.value.shape[1]
            others = [known.add(altup.state(states, k), added, self.how) for k in range(1, n)]
            return altup.together([altup.state(states, 0), *others])
        if not self.config.layers[i].output_scale:
            return self._unscaled(i)
        scale = float(self.weights[f"layers.{i}.output_scale"][0])
        return known.scale(self.of(i, "unscaled"), scale, self.how)

    def _unscaled(self, i: int) -> Known:
        """What a layer gives, but for the number that it is multiplied with."""
        if self.config.layers[i].per_layer is None:
            return self._ffn_added(i)
        return known.add(self.of(i, "ffn_added"), self.of(i, "per_layer_norm"), self.how)

    def _per_layer_own(self, i: int) -> Known:
        """What the tokens give a layer alone."""
        block, name = self.config.layers[i].per_layer, f"layers.{i}.per_layer"
        assert block is not None
        context = self._linear(f"{name}.context", self.of(None, "embedded"))
        context = known.scale(context, block.hidden_size**-0.5, self.how)
        weight = self.weights.get(f"{name}.context_norm.weight")
        context = known.norm(context, block.norm, weight, None, self.how)
        rows = self.weights.rows("embed_tokens_per_layer.weight", self.tokens[self.positions])
        row = Known(rows[:, block.begin : block.begin + block.size])
        own = known.add(context, known.scale(row, block.size**0.5, self.how), self.how)
        return known.scale(own, 0.5**0.5, self.how)

    def _per_layer_read(self, i: int) -> Known:
        block = self.config.layers[i].per_layer
        assert block is not None
        function, tabulated = activation(block.activation, 0.0), "gelu" in block.activation
        gate = known.apply(self.of(i, "per_layer_gate"), function, self.how, tabulated)
        return known.times(gate, self.of(i, "per_layer_own"), self.how)

    def _per_layer_norm(self, i: int) -> Known:
        block = self.config.layers[i].per_layer
        assert block is not None
        weight = self.weights.get(f"layers.{i}.per_layer.after_norm.weight")
        return known.norm(self.of(i, "per_layer"), block.norm, weight, None, self.how)

    def _ffn_added(self, i: int) -> Known:
        """What a layer's block for the token's own reads, behind the FFN."""
        if self.config.layers[i].altup is None:
            return self._computed(i)
        return altup.OfLayer(self.weights, i, self.how).read(self._corrected(i))

    def _computed(self, i: int) -> Known:
        """The hidden state behind a layer's FFN."""
        layer = self.config.layers[i]
        if not layer.ffn.neurons:
            return self._attended(i)
        y = self.of(i, "ffn_after_norm" if layer.norm_after else "ffn")
        if not layer.norm_before:
            both = known.add(self.of(i, "attention_norm"), y, self.how)
            return self._norm_of(f"layers.{i}.ffn_norm", both, i)
        if not layer.parallel:
            return known.add(self.of(i, "attended"), y, self.how, layer.residual_scale)
        scale = layer.residual_scale
        blocks = (known.scale(part, scale, self.how) if scale != 1 else part
                  for part in (self._attention_output(i), y))  # fmt: skip
        return known.total([self._input(i), *blocks], self.how)

    # ------------------------------------------------------------------ feed-forward

    def _part(self, part: str, i: int, expert: int | None = None) -> tuple[Float64Array, str]:
        """The matrix gate, up or down^T of a layer or of an expert, (neurons, d_model), and its
        number format."""
        ffn, name = self.config.layers[i].ffn, f"layers.{i}.ffn.bundles"
        at = {"gate": 0, "up": ffn.parts - 2, "down": ffn.parts - 1}[part] * ffn.hidden_size
        rows = (
            slice(None) if expert is None else slice(expert * ffn.d_ffn, (expert + 1) * ffn.d_ffn)
        )
        return self.weights[name][rows, at : at + ffn.hidden_size], self.weights.format(name, part)

    def _bias(self, part: str, i: int, expert: int | None = None) -> Float64Array | None:
        bias = self.weights.get(f"layers.{i}.ffn.{part}_bias")
        if bias is None or expert is None:
            return bias
        return bias.reshape(self.config.layers[i].ffn.experts, -1)[expert]

    def _up(self, part: str, i: int) -> Known:
        x, rounded = self.ffn_input(i), self._rounded(i)
        return known.linear(x, *self._of_part(part, i), self.how, rounded)

    def _of_part(
        self, part: str, i: int, expert: int | None = None
    ) -> tuple[Float64Array, Float64Array | None, str]:
        matrix, format = self._part(part, i, expert)
        return matrix, self._bias(part, i, expert), format

    def _activations(self, i: int) -> Known:
        gate = self.of(i, "gate") if self.config.layers[i].ffn.gated else None
        return self._active(i, gate, self.of(i, "up"))

    def _active(self, i: int, gate: Known | None, up: Known) -> Known:
        """What the down projection reads, of gate (None: not gated) and up."""
        ffn, how = self.config.layers[i].ffn, self.how
        function = activation(ffn.activation, ffn.threshold)
        tabulated = "gelu" in ffn.activation
        if gate is None:
            return known.apply(up, function, how, tabulated)
        if ffn.gate_cut is not None:
            gate = altup.cut(gate, ffn.gate_cut)
        if ffn.limit is not None:
            limit = ffn.limit
            gate = Known(np.minimum(gate.value, limit), gate.noise)
            up = Known(np.clip(up.value, -limit, limit) + 1, up.noise)
        if ffn.up_relu:
            up = Known(np.maximum(up.value, 0), up.noise)
        return known.times(known.apply(gate, function, how, tabulated), up, how)

    def _ffn(self, i: int) -> Known:
        ffn = self.config.layers[i].ffn
        if not ffn.router:
            down, bias, format = self._of_part("down", i)
            read = self.of(i, "activations_norm" if ffn.activations_norm else "activations")
            return known.linear(read, down.T, bias, format, self.how, self._rounded(i))
        if ffn.branch_norm is not None:
            branches = (self.of(i, f"{branch}_after_norm") for branch in ("shared", "experts"))
            return known.total(list(branches), self.how)
        y = self.of(i, "experts")
        if not ffn.shared_d_ffn:
            return y
        shared = self.of(i, "shared")
        if ffn.shared_gated:
            share = known.apply(self.of(i, "shared_gate"), sigmoid, self.how)
            shared = known.times(shared, share, self.how)
        return known.add(y, shared, self.how)

    def _shared(self, i: int) -> Known:
        x, name, ffn = self.ffn_input(i), f"layers.{i}.shared", self.config.layers[i].ffn
        function, first = activation(ffn.activation, ffn.threshold), "gate" if ffn.gated else "up"
        a = known.apply(
            self._linear(f"{name}.{first}", x), function, self.how, "gelu" in ffn.activation
        )
        if ffn.gated:
            a = known.times(a, self._linear(f"{name}.up", x), self.how)
        return self._linear(f"{name}.down", a)

    def choice(self, i: int) -> routing.Choice:
        """The Choice of a layer's router, by its logits; the weights are those of the experts that
        the other engine chose, where it recorded them."""
        bias = self.weights.get(f"layers.{i}.router.choice_bias")
        chosen = self.recorded.get((i, "choices"))
        if chosen is not None:
            chosen = np.asarray(chosen, dtype=np.int64)
        router = self.config.layers[i].ffn.router
        assert router is not None
        scales = self.weights.get(f"layers.{i}.router.expert_scales")
        return routing.choose(router, self.of(i, "router"), bias, chosen, scales)

    def _experts(self, i: int) -> Known:
        branch = self.config.layers[i].ffn.branch_norm is not None
        x = self.of(i, "experts_norm") if branch else self.ffn_input(i)
        choice = self.choice(i)
        weights = self.of(i, "choice_weights")
        y, noise = np.zeros_like(x.value), np.zeros_like(x.value)
        for expert in np.unique(choice.experts):
            tokens, at = np.nonzero(choice.experts == expert)
            its = Known(x.value[tokens], None if x.noise is None else x.noise[tokens])
            part = self._expert(i, int(expert), its)
            share = Known(weights.value[tokens, at][:, None], weights.spread[tokens, at][:, None])
            part = known.times(part, share, self.how)
            y[tokens] += part.value
            noise[tokens] += part.spread**2 + (self.how.unit * np.abs(y[tokens])) ** 2
        return known.stored(Known(y, np.sqrt(noise)), self.how)

    def _expert(self, i: int, expert: int, x: Known) -> Known:
        gated, how = self.config.layers[i].ffn.gated, self.how
        gate = known.linear(x, *self._of_part("gate", i, expert), how) if gated else None
        a = self._active(i, gate, known.linear(x, *self._of_part("up", i, expert), how))
        down, bias, format = self._of_part("down", i, expert)
        return known.linear(a, down.T, bias, format, how)
