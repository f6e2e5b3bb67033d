"""Traces of llama.cpp's own run of a GGUF file, through llama-cpp-python's evaluation callback.

llama.cpp calls it after every operation of its graph. Which value an operation gives is told by the
weights that it multiplies, whose names are those of the file; the few that have no weights are told
by their names in the graph.
"""

import ctypes
import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flashinfer.formats.architectures import architecture, model_config
from flashinfer.formats.arrays import AnyArray, Int64Array
from flashinfer.formats.errors import UserError
from flashinfer.formats.sources.gguf_checkpoint import GgufCheckpoint
from flashinfer.oracle.trace_file import write_trace
from flashinfer.transformer.values import Value, values_of

# The value that a product with one of our tensors, or a norm, gives.
BY_WEIGHT = {
    **{f"{p}_proj": p for p in "qkvo"},
    **{n: n for n in ("attention_norm", "ffn_norm", "attention_after_norm", "ffn_after_norm")},
    **{f"{p}_norm": f"{p}_norm" for p in ("q", "k", "q_a", "kv_a")},
    "q_a_proj": "q_a",
    "q_b_proj": "q",
    "kv_a_proj": "kv_a",
    "in_proj": "in_proj",
    "mixed_norm": "mixed",
    "out_proj": "o",
    "ffn.gate": "gate",
    "ffn.up": "up",
    "ffn.down": "ffn",
    "router": "router",
    "shared.down": "shared",
    "shared.weigh": "shared_gate",
    **{f"{n}_norm": f"{n}_norm" for n in ("shared_after", "experts", "experts_after")},
    "per_layer.gate": "per_layer_gate",
    "per_layer.proj": "per_layer",
    "per_layer.after_norm": "per_layer_norm",
    "final_norm": "final_norm",
    "lm_head": "logits",
}
# What these products read is a value, too.
INPUTS = {"o": "heads", "ffn": "activations", "per_layer": "per_layer_read"}
# (the name in the graph, the operation or None for any): the value
BY_NAME = {
    ("Qcur", "ROPE"): "q_turned",
    ("Kcur", "ROPE"): "k_turned",
    ("Qcur_pos", "ROPE"): "q_turned",
    ("Kcur_pos", "ROPE"): "k_turned",
    ("Vcur_normed", None): "v_norm",
    ("Qcur_attn_temp_scaled", None): "q_turned",
    ("ffn_inp", None): "attended",
    ("attn_out", "ADD"): "attended",
    ("pe_in", None): "ffn_added",
    ("l_out", None): "output",
    ("ffn_moe_topk", None): "choices",
    ("ffn_moe_weights", None): "choice_weights",
    ("ffn_moe_weights_norm", None): "choice_weights",
    ("ffn_moe_weights_softmax", None): "choice_weights",
    ("ffn_moe_weights_scaled", None): "choice_weights",
    ("ffn_moe_out", None): "experts",
    ("ffn_out", None): "ffn",
    ("embd", None): "embedded",
    ("inp_embd", None): "embedded",
    ("inp_scaled", None): "embedded",
    ("inpL", None): "embedded",  # with learned positions
    ("result_output", None): "logits",
}
PRODUCTS = ("MUL_MAT", "MUL", "ADD", "RMS_NORM", "NORM")
NUMBERS = {0: np.float32, 1: np.float16, 26: np.int32}  # GGML's types, by their numbers
CACHES = {"f32": 0, "f16": 1, "q8_0": 8}  # likewise
CELLS = 256  # llama.cpp rounds a context up to so many tokens


class Tensor(ctypes.Structure):
    """The beginning of ggml_tensor in ggml.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]

    @property
    def label(self) -> str:
        """Its name."""
        return self.name.decode("utf-8", "replace")

    def array(self) -> AnyArray:
        """Its numbers, a copy: (ne[3], ne[2], ne[1], ne[0]) without leading ones."""
        dtype = np.dtype(NUMBERS[self.type])
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        nbytes = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
        memory = (ctypes.c_uint8 * nbytes).from_address(self.data)
        flat = np.frombuffer(memory, dtype=np.uint8)
        view = np.ndarray(shape, dtype, buffer=flat.data, strides=strides)
        while view.ndim > 2 and len(view) == 1:
            view = view[0]
        return np.array(view)


class Graph:
    """The evaluation callback: ``found`` {name of a value: array}.

    checkpoint  the GgufCheckpoint that is run
    """

    def __init__(self, checkpoint: GgufCheckpoint, base: Any) -> None:
        self.base, self.failure = base, ""
        config, naming = model_config(checkpoint.config), architecture(checkpoint.config)
        self.values = values_of(config, naming)
        self.by_place = {(value.layer, value.key): value for value in self.values}
        self.layers = config.layers
        self.keys = _keys_of_weights(checkpoint.naming)
        self.packed = checkpoint.naming.ROWS
        self.turned = checkpoint.form.paired
        self.found: dict[str, AnyArray] = {}
        self.scaled_queries = False

    def __call__(self, address: int, asked: bool, user_data: Any) -> bool:
        """llama.cpp has computed the tensor at ``address``, or (``asked``) is about to."""
        if asked:
            return True
        try:
            tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
            self._check(address, tensor)
            self._take(tensor, self.base.ggml_op_desc(address).decode())
        except Exception as error:  # ctypes would print it, and go on
            self.failure = self.failure or f"{type(error).__name__}: {error}"
            return False
        return True

    def _check(self, address: int, tensor: Tensor) -> None:
        if self.base.ggml_get_name(address).decode("utf-8", "replace") != tensor.label:
            raise UserError("its ggml_tensor has another layout than that of ggml 0.9 to 0.25")

    def _take(self, tensor: Tensor, operation: str) -> None:
        sources = [ctypes.cast(s, ctypes.POINTER(Tensor)).contents for s in tensor.src[:2] if s]
        name, _, number = tensor.label.partition("-")
        layer = int(number) if number.isdecimal() else None
        for (label, wanted), key in BY_NAME.items():
            if label == name and wanted in (None, operation):
                self._keep(layer, key, tensor.array())
        if operation == "SCALE" and sources[0].label.startswith("Qcur"):
            self.scaled_queries = True
        if operation in PRODUCTS or operation == "MUL_MAT_ID":
            for source in sources:
                self._of_weight(source.label, tensor, sources, operation)

    def _of_weight(
        self, weight: str, tensor: Tensor, sources: list[Tensor], operation: str
    ) -> None:
        """Take what a product with ``weight``, or the sum with its bias, gives."""
        found = re.fullmatch(r"blk\.(\d+)\.(.*)\.(weight|bias)", weight)
        layer = int(found[1]) if found else None
        bare = found[2] if found else weight.rpartition(".")[0]
        for key in self.keys.get(bare, ()):
            if layer is not None and key in ("gate", "up", "ffn") and self.layers[layer].ffn.router:
                continue
            if key == "logits" and (None, "head") in self.by_place:
                key = "head"  # the logits come after scale and cap
            if operation != "MUL_MAT_ID":
                self._keep(layer, key, tensor.array())
            if key in INPUTS and operation == "MUL_MAT":
                self._keep(layer, INPUTS[key], sources[1].array())

    def _keep(self, layer: int | None, key: str, array: AnyArray) -> None:
        value = self.by_place.get((layer, key))
        if value is None:
            return
        router = self.layers[layer or 0].ffn.router
        if key == "choice_weights" and router is not None and router.expert_scales:
            return  # the learned numbers of experts are multiplied with their outputs there
        if key in self.packed_keys(layer):
            part = f"{key}_proj" if f"{key}_proj" in self.packed else key
            array = array[..., self.packed[part](self.layers[layer or 0])]
        tokens = array.size // int(np.prod(value.shape))
        array = array.reshape(tokens, *value.shape)
        if self.turned and key in ("q_turned", "k_turned"):
            array = _halves(array, self.layers[layer or 0].attention.head_dim)
        self.found[value.name] = array

    def packed_keys(self, layer: int | None) -> set[str]:
        """The values that are parts of one packed product."""
        return {part.removesuffix("_proj") for part in self.packed} if layer is not None else set()


def _keys_of_weights(naming: Any) -> dict[str, list[str]]:
    """{tensor of the file, without its layer and kind: the values that it gives}."""
    weights = ((o, t) for o, t in naming.NAMES.items() if o.endswith(".weight"))
    named = {ours.removesuffix(".weight"): theirs for ours, theirs in weights}
    named.update({f"layers.{{}}.ffn.{part}": theirs for part, theirs in naming.FFN.items()})
    keys: dict[str, list[str]] = {}
    for ours, theirs in named.items():
        key = BY_WEIGHT.get(ours.removeprefix("layers.{}."))
        for name in theirs.split("|"):
            bare = name.removeprefix("blk.{}.").rpartition(".")[0]
            if key and key not in keys.setdefault(bare, []):
                keys[bare].append(key)
    return keys


def _halves(array: AnyArray, head_dim: int) -> AnyArray:
    """Heads whose rotary pairs lie side by side -> heads whose pairs lie half a head apart."""
    pairs = array.reshape(len(array), -1, head_dim // 2, 2).swapaxes(2, 3)
    return np.ascontiguousarray(pairs).reshape(array.shape)


def trace_llama_cpp(
    gguf: Path | str,
    tokens: Sequence[int],
    path: Path | str,
    threads: int = 1,
    keys: str = "f16",
) -> dict[str, AnyArray]:
    """Run ``tokens`` with llama.cpp and write the trace to ``path``; returns {name: (T, ...)}.

    keys  what keys are kept in: one of CACHES; the trace says float16 whatever it is, and
          ``compare`` has to be told of another
    Attention is computed without its fused form, so that its steps can be seen; values
    are kept in float16, as llama.cpp does by itself. Raises UserError where llama-cpp-python is
    missing or cannot run the file.
    """
    with GgufCheckpoint(gguf) as checkpoint:
        if checkpoint.form.blocks:
            raise UserError(
                f"{gguf}: traces of llama.cpp cannot be taken of {checkpoint.architecture}, whose "
                "blocks are layers of their own there"
            )
        api, base, version = _libraries(gguf)
        graph = Graph(checkpoint, base)
        context = -(-len(tokens) // CELLS) * CELLS
        ids = np.asarray(tokens, dtype=np.int64)
        _run(api, str(gguf), ids, context, threads, CACHES[keys], graph)
        if graph.failure:
            raise UserError(f"{gguf}: llama.cpp cannot be traced: {graph.failure}")
        order: list[Value] = [v for v in graph.values if v.name in graph.found]
        write_trace(
            path, order, graph.found, f"llama.cpp by llama-cpp-python {version}",
            checkpoint.config, tokens, context=context,
            arithmetic="llama.cpp-scaled" if graph.scaled_queries else "llama.cpp",
        )  # fmt: skip
        return graph.found


def _libraries(gguf: Path | str) -> tuple[Any, Any, str]:
    """(llama.cpp's functions, those of ggml, the version)."""
    try:
        import llama_cpp
        from llama_cpp import llama_cpp as api
    except ImportError:
        raise UserError(f"{gguf}: tracing llama.cpp needs: pip install llama-cpp-python") from None
    folder = Path(llama_cpp.__file__).parent / "lib"
    base = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    for function in (base.ggml_get_name, base.ggml_op_desc):
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    return api, base, llama_cpp.__version__


@cache
def _silent(kind: Any) -> Any:
    """A callback that discards what llama.cpp logs; it is kept, as llama.cpp goes on using it."""
    return kind(lambda level, text, data: None)


def _run(
    api: Any,
    gguf: str,
    tokens: Int64Array,
    context: int,
    threads: int,
    keys: int,
    graph: Graph,
) -> None:
    """Run ``tokens`` as one batch, all of whose logits are wanted."""
    api.llama_log_set(_silent(api.llama_log_callback), ctypes.c_void_p(0))
    callback = api.ggml_backend_sched_eval_callback(graph)
    with ExitStack() as close:
        model = api.llama_model_load_from_file(gguf.encode(), api.llama_model_default_params())
        if not model:
            raise UserError(f"{gguf}: llama.cpp cannot load it")
        close.callback(api.llama_model_free, model)
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type, options.type_k = 0, keys
        options.cb_eval = callback
        run = api.llama_init_from_model(model, options)
        if not run:
            raise UserError(f"{gguf}: llama.cpp has no context of {context} tokens for it")
        close.callback(api.llama_free, run)
        batch = api.llama_batch_init(len(tokens), 0, 1)
        close.callback(api.llama_batch_free, batch)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = int(token), i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if api.llama_decode(run, batch) and not graph.failure:
            raise UserError(f"{gguf}: llama.cpp cannot run these {len(tokens)} tokens")
