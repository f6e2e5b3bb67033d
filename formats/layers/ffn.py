"""A feed-forward layer: its neurons, or the experts of a mixture and their router."""

from dataclasses import dataclass
from typing import Literal

from ..errors import FormatError
from ..tensors import ATTENTION, FFN, PREDICTOR, SMALL, TensorSpec, vector
from .norm import NormConfig

ACTIVATIONS = ("relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu")
SPARSE = ("relu", "relu2")  # those that are zero for every input at or below a threshold
# Of a mixture whose branches have norms: before its experts, behind them, and behind the shared
# one.
BRANCH_NORMS = ("experts_norm", "experts_after_norm", "shared_after_norm")
# No honest layer has more: keeps hostile configs from huge allocations.
MOST_NEURONS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a mixture chooses the experts of a token, and what each of them counts.

    experts           of the layer, of equal size
    experts_per_token  that are chosen for each token
    scoring           what scores become: "softmax" over all experts, "sigmoid", or of each expert
                      chosen a softmax over those near it ("sparsemixer", Phi-3.5-MoE)
    jitter            with "sparsemixer": which those are
    normalised        the weights of those chosen are made to add up to 1 (of a softmax that is
                      the softmax over those chosen)
    router_bias       scores have a bias
    choice_bias       a bias that is added to what experts are chosen by, and not to their weights
    groups, groups_kept  experts lie in so many groups, of which a token chooses from the best few
    group_by          what a group is worth: its best expert ("max") or its best two ("top2")
    scale             what the weights are multiplied with at last
    early             the router reads the layer's input, before its norm and its mixer: so experts
                      are known, and can be read, while tokens are mixed (SmallThinker)
    norm              the router reads the hidden state before the FFN's norm through this one, and
                      scores are divided by the root of its size (Gemma 4); None: what the FFN reads
    expert_scales     each expert's weight is multiplied with a learned number at last
    """

    experts: int
    experts_per_token: int
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    jitter: float = 0.0
    normalised: bool = True
    router_bias: bool = False
    choice_bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_by: Literal["top2", "max"] = "top2"
    scale: float = 1.0
    early: bool = False
    norm: NormConfig | None = None
    expert_scales: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.experts_per_token <= self.experts:
            raise FormatError(
                f"config: {self.experts_per_token} of {self.experts} experts cannot be chosen"
            )
        if self.experts % self.groups or not 0 < self.groups_kept <= self.groups:
            raise FormatError(
                f"config: {self.groups_kept} of {self.groups} groups of {self.experts} experts "
                "cannot be chosen"
            )
        if self.experts_per_token > self.reach:
            raise FormatError(
                f"config: {self.experts_per_token} experts cannot be chosen from groups of "
                f"{self.reach} together"
            )

    @property
    def reach(self) -> int:
        """How many experts a token chooses from."""
        return self.experts // self.groups * self.groups_kept

    def tensors(self, name: str, hidden_size: int) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        specs = [TensorSpec(f"{name}.router.weight", (self.experts, hidden_size), SMALL, True)]
        if self.router_bias:
            specs.append(vector(f"{name}.router.bias", self.experts))
        if self.choice_bias:
            specs.append(vector(f"{name}.router.choice_bias", self.experts))
        if self.norm:
            specs += self.norm.tensors(f"{name}.router_norm", hidden_size)
        if self.expert_scales:
            specs.append(vector(f"{name}.router.expert_scales", self.experts))
        return specs

    @property
    def reads_residual(self) -> bool:
        """Whether it reads a hidden state before the FFN's norm."""
        return self.early or self.norm is not None


@dataclass(frozen=True, kw_only=True)
class FFNConfig:
    """Of one layer.

    d_ffn         neurons of the FFN, or of each of its experts; 0: the layer has no FFN
    gated         it is down(activation(gate x) * (up x)), else down(activation(up x))
    activation    one of ACTIVATIONS; relu and relu2 are 0 up to ``threshold`` (FATReLU)
    up_relu       with ``gated``: up x passes a ReLU, too (dReLU)
    limit         with ``gated``: gate x is at most this, up x within it, and 1 is added to that
                  (GPT-OSS); None: not
    gate_cut      with ``gated``: of a token's gates those count that are more than so many standard
                  deviations above their mean, less that (Gemma 3n's Gaussian top-k): as all gates
                  are needed for that, the FFN is used whole; None: not
    rounded       what its linear layers read is rounded to 8 bits, with one scale for each token
                  (BitNet b1.58)
    activations_norm  how all of a token's activations are normalised before the down projection;
                  None: they are not
    ffn_bias      its linear layers have biases
    router        of a mixture of experts; None: there are no experts
    neurons_apart  of a mixture with predictors, which tell its neurons apart: those are read one by
                  one, and not whole experts
    matrices      the FFN, or each expert, is always used whole, and its matrices lie as the model's
                  source had them
    shared_d_ffn  neurons of the shared expert, which every token uses; 0: there is none
    shared_gated  its output is multiplied with sigmoid(shared_weigh . x)
    branch_norm   with a shared expert: the others read the hidden state before the FFN's norm
                  through one of their own, and the outputs of the shared expert and of the others
                  are normalised, each by itself, before they are added (Gemma 4); None: not
    """

    hidden_size: int
    d_ffn: int
    gated: bool = True
    activation: str = "silu"
    threshold: float = 0.0
    up_relu: bool = False
    limit: float | None = None
    gate_cut: float | None = None
    rounded: bool = False
    activations_norm: NormConfig | None = None
    ffn_bias: bool = False
    router: RouterConfig | None = None
    neurons_apart: bool = False
    matrices: bool = False
    shared_d_ffn: int = 0
    shared_gated: bool = False
    branch_norm: NormConfig | None = None

    def __post_init__(self) -> None:
        if self.neurons > MOST_NEURONS or self.shared_d_ffn > MOST_NEURONS:
            raise FormatError(
                f"config: a layer of {self.neurons + self.shared_d_ffn} neurons is not that of a "
                "model"
            )
        if self.activation not in ACTIVATIONS:
            raise FormatError(
                f"config: activation {self.activation!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )
        if self.gate_cut is not None and not (self.gated and self.matrices):
            raise FormatError("config: gates that are cut are those of an FFN that is used whole")
        if self.rounded and (self.router or self.shared_d_ffn):
            raise FormatError("config: an FFN that rounds what it reads has no experts")
        norm = self.activations_norm
        if norm and (norm.kind != "rms" or self.router or self.shared_d_ffn):
            raise FormatError(
                "config: activations are normalised here by their mean square, and not those of "
                "experts"
            )

    @property
    def needs_all(self) -> bool:
        """Whether each neuron's part in the result depends on all of the others, which are
        multiplied as one."""
        return self.gate_cut is not None or (self.rounded and self.matrices)

    @property
    def sparse(self) -> bool:
        """Whether most neurons may be silent, and read what a predictor reads."""
        return self.activation in SPARSE and self.branch_norm is None and not self.needs_all

    @property
    def experts(self) -> int:
        """How many experts there are; 0: the FFN is one."""
        return self.router.experts if self.router else 0

    @property
    def neurons(self) -> int:
        """Of the layer: those of all its experts together."""
        return self.d_ffn * max(1, self.experts)

    @property
    def reads_experts(self) -> bool:
        """Whether an expert, and not a neuron, is read and kept as one."""
        return self.router is not None and not self.neurons_apart

    @property
    def units(self) -> int:
        """What is read and kept as one: its neurons, its experts, or all of it."""
        if self.matrices:
            return max(1, self.experts)
        return self.experts if self.reads_experts else self.neurons

    @property
    def unit_neurons(self) -> int:
        return self.d_ffn if self.reads_experts or self.matrices else 1

    @property
    def routed_units(self) -> int:
        """Units that a router chooses for each token; 0: none does."""
        return self.router.experts_per_token if self.router and self.reads_experts else 0

    @property
    def chooses_early(self) -> bool:
        """Whether its units are known before the layer's tokens are mixed."""
        return self.reads_experts and self.router is not None and self.router.early

    @property
    def parts(self) -> int:
        """Rows of a bundle, each hidden_size wide: [up | down], or [gate | up | down]."""
        return 3 if self.gated else 2

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """{"gate", "up", "down": (rows, columns)} of the FFN, or of an expert."""
        d, n = self.hidden_size, self.d_ffn
        gate = {"gate": (n, d)} if self.gated else {}
        return {**gate, "up": (n, d), "down": (d, n)}

    def shared_shapes(self) -> dict[str, tuple[int, int]]:
        """{"gate", "up", "down": (rows, columns)} of the expert that every token uses."""
        d, n = self.hidden_size, self.shared_d_ffn
        gate = {"gate": (n, d)} if self.gated else {}
        return {**gate, "up": (n, d), "down": (d, n)} if n else {}

    def tensors(self, name: str) -> list[TensorSpec]:
        """Its TensorSpecs, under names that begin with the layer's ``name``."""
        d, specs = self.hidden_size, list[TensorSpec]()
        if not self.neurons:
            return specs
        if self.router:
            specs += self.router.tensors(name, d)
        if self.shared_gated:
            specs.append(TensorSpec(f"{name}.shared.weigh.weight", (1, d), SMALL, exact=True))
        if self.branch_norm:
            for norm in BRANCH_NORMS:
                specs += self.branch_norm.tensors(f"{name}.{norm}", d)
        if self.activations_norm:
            specs += self.activations_norm.tensors(f"{name}.activations_norm", self.d_ffn)
        if self.ffn_bias:
            if self.gated:
                specs.append(vector(f"{name}.ffn.gate_bias", self.neurons))
            specs.append(vector(f"{name}.ffn.up_bias", self.neurons))
            specs.append(vector(f"{name}.ffn.down_bias", d * max(1, self.experts)))
        specs += [
            TensorSpec(f"{name}.shared.{part}.weight", shape, ATTENTION)
            for part, shape in self.shared_shapes().items()
        ]
        # One row a neuron: [up_i | down_i] or [gate_i | up_i | down_i] (paper section 3.2,
        # row-column bundling).
        bundles = (self.neurons, self.parts * d)
        if self.matrices:  # one row a unit: all of its matrices
            bundles = (self.units, self.unit_neurons * self.parts * d)
        return [*specs, TensorSpec(f"{name}.ffn.bundles", bundles, FFN)]

    def predictor_tensors(self, name: str, rank: int) -> list[TensorSpec]:
        """The TensorSpecs of its low-rank predictor (paper section 3.1): B (A x) + bias."""
        if not self.neurons:
            return []
        return [
            TensorSpec(f"{name}.predictor.a", (rank, self.hidden_size), PREDICTOR),
            TensorSpec(f"{name}.predictor.b", (self.neurons, rank), PREDICTOR),
            TensorSpec(f"{name}.predictor.bias", (self.neurons,), PREDICTOR, exact=True),
        ]
