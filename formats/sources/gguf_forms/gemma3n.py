"""The form of Gemma 3n: several hidden states of a token, and keys that some layers share."""

import numpy as np

from ...architectures.gemma4 import FULL, SLIDING
from ...bounded_json import JsonObject
from ...layers.altup import MOST_STATES
from .form import BLOCK, GgufForm
from .gemma4 import BORROWED, CONTEXT
from .gemma4 import NAMES as OF_TOKENS
from .header import Header

OWN = {
    "altup.norm.weight": "altup_router_norm.weight",
    "altup.router.weight": "altup_router.weight",
    "altup.predict.weight": "altup_predict_coef.weight",
    "altup.correct.weight": "altup_correct_coef.weight",
    "altup.correct_scale": "altup_correct_scale.weight",
    "laurel.left.weight": "laurel_l.weight",
    "laurel.right.weight": "laurel_r.weight",
    "laurel.norm.weight": "laurel_post_norm.weight",
}
STATES = {"in": "altup_proj.weight", "out": "altup_unembd_proj.weight"}
NUMBERED = {f"states.{way}.{i}.weight": i for way in STATES for i in range(MOST_STATES - 1)}
NAMES = {
    **OF_TOKENS,
    **{f"layers.{{}}.{ours}": f"{BLOCK}.{theirs}" for ours, theirs in OWN.items()},
    **{name: STATES[name.split(".")[1]] for name in NUMBERED},
}
NEURONS, KEYS_OF, SILENT = (
    "feed_forward_length", "attention.shared_kv_layers", "activation_sparsity_scale",
)  # fmt: skip
# llama.cpp takes these for all models: layers that have keys, layers of whose gates only the
# largest count, how many standard deviations these are above the mean, and the cap of logits.
WITH_KEYS, CUT, DEVIATIONS, CAP = 20, 10, 1.6448533535003662, 30.0
SHARE = 0.95  # of gates that are normally distributed: how many are below the cut


def _gemma3n(header: Header, config: JsonObject) -> JsonObject:
    """What Gemma 3n's config says otherwise. Refused is what llama.cpp would compute otherwise."""
    layers, shared = header.layers(), header.of(KEYS_OF) or 0
    kinds = config.get("layer_types") or [SLIDING if (n + 1) % 5 else FULL for n in range(layers)]
    if shared != max(0, layers - WITH_KEYS):
        raise header.refusal(KEYS_OF)
    if shared and kinds[WITH_KEYS - 2 : WITH_KEYS] != [SLIDING, FULL]:
        raise header.refusal("attention.sliding_window_pattern")
    width = config["head_dim"]
    if header.of("attention.value_length", int, width) != width:
        raise header.refusal("attention.value_length")
    if header.of("final_logit_softcapping", float, CAP) != CAP:
        raise header.refusal("final_logit_softcapping")
    rows = {name: tensor.shape[0] for name, tensor in header.tensors.items() if tensor.shape}
    near = {"rope_type": "default", "rope_theta": header.of("rope.freq_base_swa", float, 10000.0)}
    return {
        "intermediate_size": header.of_layers(NEURONS),
        "hidden_activation": config["hidden_act"],
        "layer_types": kinds,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": header.of("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": rows.get("per_layer_token_embd.weight"),
        "altup_active_idx": header.of("altup.active_idx", int, 0),
        "altup_num_inputs": header.of("altup.num_inputs", int, 4),
        "altup_correct_scale": True,
        "laurel_rank": rows.get("blk.0.laurel_l.weight"),
        "activation_sparsity_pattern": _pattern(header, layers),
        "final_logit_softcapping": CAP,
        "rope_parameters": {FULL: config["rope_parameters"], SLIDING: near},
    }


def _pattern(header: Header, layers: int) -> list[float]:
    """The share of each layer's neurons that are silent."""
    cut = min(CUT, layers)
    if header.is_list(SILENT):
        header.known.add(SILENT)
        found = header.file.metadata[f"{header.architecture}.{SILENT}"]
        expected = np.array([DEVIATIONS] * cut + [-np.inf] * (layers - cut))
        if found.shape != expected.shape or found.dtype.kind != "f":
            raise header.refusal(SILENT)
        if not np.allclose(found, expected, rtol=1e-6, atol=0):
            raise header.refusal(SILENT)
    return [SHARE] * cut + [0.0] * (layers - cut)


GEMMA3N = (
    GgufForm(
        architecture="gemma3n",
        model_type="gemma3n_text",
        activation="gelu_pytorch_tanh",
        windows=5,
        fields=_gemma3n,
        by_layer=(NEURONS,),
        names=NAMES,
        stacked=(CONTEXT,),
        borrowed=BORROWED,
        numbered=NUMBERED,
    ),
)
