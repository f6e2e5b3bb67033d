"""What a model is, in the engine's terms: a few options, whatever the architecture's name."""

from dataclasses import dataclass, field

from .errors import FormatError, shown
from .numbers import is_number, is_whole

ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu")
SPARSE = ("relu", "relu2")  # those that are zero for every input at or below a threshold
ROTARY = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
# No honest dimension is larger: keeps hostile configs from huge allocations.
LARGEST = 1 << 31
MOST_LAYERS = MOST_EXPERTS = 4096
MOST_NEURONS = 1 << 24
WIDEST = 1 << 20
# No honest number lies outside of them, and between them all formulas stay finite.
SMALLEST_NUMBER, LARGEST_NUMBER = 2.0**-126, 2.0**100
# Of c tanh(x / c): tanh is computed to some 2^-23, so that a larger c leaves no exact digits.
LEAST_CAP, MOST_CAP = 1e-3, 1e3


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): the first ``dim`` values of a head are turned in pairs
    (i, i + dim / 2), by position times base^(-2 i / dim).

    kind        one of ROTARY: how the frequencies are changed for long texts
    parameters  of that kind, under Hugging Face's names, with
                ``original_max_position_embeddings`` and ``max_position_embeddings``
    """

    dim: int
    base: float
    kind: str = "default"
    parameters: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The options that the engine knows. Dimensions keep Hugging Face's names.

    d_ffn            neurons of a feed-forward layer, those of all its experts together
    experts          of a layer, of equal size; 0: none, the FFN is one
    experts_per_token  that the router chooses for each token
    neurons_apart    of a mixture with predictors, which tell its neurons apart: those are read one
                     by one, and not whole experts
    router_bias      the router has a bias
    router_normalised  the weights of those chosen are made to add up to 1
    shared_d_ffn     neurons of the shared expert, which every token uses; 0: there is none
    shared_gated     its output is multiplied with sigmoid(shared_weigh . x)
    embedding_size   width of the token embeddings; project_in/out where it is not hidden_size
    embedding_scale  what token embeddings are multiplied with
    position_offset  row of ``embed_positions`` that position 0 uses
    positions        "learned" (a row of ``embed_positions`` is added), "rotary" or "alibi"
    norm             "layer" (mean and variance, with biases) or "rms"
    norm_before      a norm before each block (pre-norm), else after its residual (post-norm)
    norm_affine      the norms have weights
    final_norm       a last norm before the output head
    parallel         attention and FFN read the same hidden state, and both are added to it
    shared_norm      with ``parallel``: the FFN reads what attention reads
    qk_norm          each head's queries and keys are normalised, before they are turned
    qk_norm_whole    not each head's by themselves, but all heads' together
    qkv_bias, o_bias, ffn_bias, head_bias  these linear layers have biases
    gated            the FFN is down(activation(gate x) * (up x)), else down(activation(up x))
    activation       one of ACTIVATIONS; relu and relu2 are 0 up to ``threshold`` (FATReLU)
    up_relu          with ``gated``: up x passes a ReLU, too (dReLU)
    limit            with ``gated``: gate x is at most this, up x within it, and 1 is added to
                     that (GPT-OSS); 0: not
    sliding_windows  per layer, how many tokens back attention sees; 0: all
    rotary_near      rotary positions of the layers that have such a window, where they differ
    attention_scale  what scores are multiplied with; 0: head_dim^-1/2
    attention_sinks  each head has a learned extra softmax logit
    score_cap, logit_cap  c tanh(x / c) of scores and of logits; 0: not
    norm_after       a norm after each block, too, before it is added
    residual_scale   what a block's output is multiplied with before it is added
    logit_scale      what logits are multiplied with
    tied             the output head is the embedding matrix
    """

    vocab_size: int
    hidden_size: int
    d_ffn: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    embedding_size: int
    embedding_scale: float = 1.0
    position_offset: int = 0
    positions: str = "rotary"
    rotary: Rotary | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-5
    norm_before: bool = True
    norm_affine: bool = True
    final_norm: bool = True
    parallel: bool = False
    shared_norm: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False
    head_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    threshold: float = 0.0
    up_relu: bool = False
    limit: float = 0.0
    sliding_windows: tuple[int, ...] = ()
    rotary_near: Rotary | None = None
    attention_scale: float = 0.0
    attention_sinks: bool = False
    score_cap: float = 0.0
    logit_cap: float = 0.0
    norm_after: bool = False
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    experts: int = 0
    experts_per_token: int = 0
    neurons_apart: bool = False
    router_bias: bool = False
    router_normalised: bool = True
    shared_d_ffn: int = 0
    shared_gated: bool = False
    tied: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        width = self.num_attention_heads * self.head_dim
        if max(width, self.hidden_size) > WIDEST or self.d_ffn > MOST_NEURONS:
            raise FormatError(
                f"config: a hidden size of {self.hidden_size}, heads of {width} and {self.d_ffn} "
                "neurons together are not those of a model"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise FormatError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise FormatError(
                f"config: activation {self.activation!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        if self.experts and not 0 < self.experts_per_token <= self.experts:
            raise FormatError(
                f"config: {self.experts_per_token} of {self.experts} experts cannot be chosen"
            )
        for what, cap in (("attention", self.score_cap), ("logit", self.logit_cap)):
            if cap and not LEAST_CAP <= cap <= MOST_CAP:
                raise FormatError(
                    f"config: the {what} soft cap {cap} is not within {LEAST_CAP} to {MOST_CAP}"
                )
        for rotary in filter(None, (self.rotary, self.rotary_near)):
            if rotary.dim % 2 or not 0 < rotary.dim <= self.head_dim:
                raise FormatError(
                    f"config: {rotary.dim} values of each head of {self.head_dim} cannot be rotary"
                )

    @property
    def sparse(self):
        """Whether most neurons may be silent: what a predictor needs."""
        return self.activation in SPARSE

    @property
    def units(self):
        """What of a layer's FFN is read and kept as one: its neurons, or its experts."""
        return self.experts if self.reads_experts else self.d_ffn

    @property
    def reads_experts(self):
        return self.experts > 0 and not self.neurons_apart

    @property
    def unit_neurons(self):
        return self.d_ffn // self.units

    @property
    def parts(self):
        """Rows of a bundle, each hidden_size wide: [up | down], or [gate | up | down]."""
        return 3 if self.gated else 2


def dimension(config, key, default=None, most=LARGEST):
    """The positive integer ``config[key]``. Raises FormatError where it is not one."""
    value = config.get(key)
    value = default if value is None else value
    if not is_whole(value, 1, most - 1):
        raise FormatError(f"config: {key} is {shown(value)}, not a positive whole number")
    return value


def number(config, key, zero=False):
    """The positive number ``config[key]``, or 0 where ``zero`` allows it. Raises FormatError."""
    value = config.get(key)
    if not is_number(value):
        raise FormatError(f"config: {key} is {shown(value)}, not a number")
    if not (is_number(value, SMALLEST_NUMBER, LARGEST_NUMBER) or (zero and value == 0)):
        raise FormatError(f"config: {key} is {shown(value)}, not a positive number of float32")
    return float(value)


def flag(config, key):
    """The boolean ``config[key]``; null is false. Raises FormatError where it is neither."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"config: {key} is {shown(value)}, not true or false")
    return bool(value)


def token_ids(config, key):
    """``config[key]``, which may be absent, one id or a list of ids, as a tuple."""
    value = config.get(key)
    values = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(is_whole(v, 0, LARGEST - 1) for v in values):
        raise FormatError(f"config: {key} is {shown(value)}, not a token id or a list of them")
    return values
