"""What a model is, in the engine's terms: a few options, whatever the architecture's name."""

from dataclasses import dataclass

from .errors import FormatError

ACTIVATIONS = ("relu",)
LARGEST = 1 << 31  # no honest dimension is larger; keeps hostile configs from huge allocations


@dataclass(frozen=True)
class ModelConfig:
    """The options that the engine knows. Dimensions keep Hugging Face's names.

    d_ffn            neurons of a feed-forward layer
    embedding_size   width of the token embeddings; project_in/out where it is not hidden_size
    position_offset  row of ``embed_positions`` that position 0 uses
    norm_before      layer norm before each block (pre-norm), else after its residual (post-norm)
    final_norm       a last layer norm before the output head
    norm_affine      the norms have weights and biases
    bias             the linear layers have biases
    tied             the output head is the embedding matrix
    """

    vocab_size: int
    hidden_size: int
    d_ffn: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    embedding_size: int
    position_offset: int
    norm_before: bool
    final_norm: bool
    norm_affine: bool
    bias: bool
    activation: str
    tied: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise FormatError(
                f"config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise FormatError(
                f"config: activation {self.activation!r} is not supported; "
                f"supported: {', '.join(ACTIVATIONS)}"
            )

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads


def dimension(config, key, default=None):
    """The positive integer ``config[key]``. Raises FormatError where it is not one."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LARGEST:
        raise FormatError(f"config: {key} is {str(value)[:40]!r}, not a positive whole number")
    return value


def flag(config, key, default):
    """The boolean ``config[key]``. Raises FormatError where it is not one."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"config: {key} is {str(value)[:40]!r}, not true or false")
    return value


def token_ids(config, key):
    """``config[key]``, which may be absent, one id or a list of ids, as a tuple."""
    value = config.get(key)
    values = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < LARGEST for v in values):
        raise FormatError(f"config: {key} is {str(value)[:40]!r}, not a token id or a list of them")
    return values
