"""Synthetic models of real shapes, to measure a board before downloading a real one.

The weights are random, but the model is consistent: a given share of its neurons fires, or it
chooses experts with a given locality; its predictors are right, and dense and predicted runs give
the same tokens.

The hidden states carry a code c_t with |c_t| = 1 that turns along the sequence, in a subspace Q
that nothing else writes to. Each neuron or expert i has a random direction b_i in that subspace,
and the scores that choose it are approximately b_i . c_t. How fast the code turns determines how
many neurons or experts are new at a token. Learned positions bring the code. In a model without
them the tokens do, and its output head makes token t + 1 follow token t.
"""

from functools import partial
from pathlib import Path

from flashinfer.formats.architectures import model_config
from flashinfer.formats.bounded_json import JsonObject
from flashinfer.formats.bundle.calibration import Calibration
from flashinfer.formats.bundle.layout import format_of, layout, predictor_layout
from flashinfer.formats.bundle.writer import new_tensor, write_bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.files import refuse_target
from flashinfer.formats.number_formats import number_format
from flashinfer.formats.progress import Progress, no_progress
from flashinfer.formats.tensors import SMALL
from flashinfer.synth.experts import ExpertMaker
from flashinfer.synth.maker import SIMULATED_TOKENS, Maker
from flashinfer.synth.neurons import NeuronMaker

__all__ = ["synthesize"]


def synthesize(
    destination: Path | str,
    config: JsonObject,
    dtype: str = "f16",
    active: float = 0.03,
    fresh: float = 0.024,
    seed: int = 0,
    progress: Progress = no_progress,
    dense_dtype: str | None = None,
    repeated: float = 0.4,
    outline: bool = False,
) -> Calibration:
    """Write a synthetic bundle of a Hugging Face config; return its calibration.

    dtype        number format of the weights; norms and biases are always f32
    active       share of a layer's neurons that fire for a token
    fresh        share of the layer that fires and did not fire for the last five tokens
    progress     is told the bytes written, as "write"
    dense_dtype  number format of the weights that are not FFN; None: ``dtype``
    outline      write a file of the same size without weights, to be planned only
    repeated     of a mixture: share of a token's experts that the token before it used, too

    Memory: some tens of MB and one square matrix of hidden_size. Raises UserError where no model
    has these shares, the model's activation leaves no neuron silent, or the destination cannot be
    written.
    """
    refuse_target(destination)
    model = model_config(config)
    if not (model.sparse or model.mixture) or (model.tied and not model.learned_positions):
        raise UserError(
            "a synthetic model needs a ReLU or experts, and without learned positions an untied "
            "output head"
        )
    ffn, dense = number_format(dtype), number_format(dense_dtype or dtype)
    source: JsonObject = {"synthetic": True, "seed": seed}
    specs = layout(model)
    maker: Maker
    if model.mixture:
        maker = ExpertMaker(model, repeated, seed)
        source["repeated"] = repeated
    else:
        maker = neurons = NeuronMaker(model, active, fresh, seed)
        source.update(active=active, fresh=fresh)
        small = sum(spec.role == SMALL for spec in specs)
        specs[small:small] = predictor_layout(model, [neurons.rank] * model.num_hidden_layers)
    calibration = Calibration(
        tuple(maker.record(layer) for layer in range(model.num_hidden_layers)),
        text=f"synthetic, seed {seed}",
        tokens=SIMULATED_TOKENS,
    )
    tensors = [
        new_tensor(
            spec.name,
            format_of(spec, ffn, dense),
            spec.shape,
            partial(maker.chunks, spec),
        )
        for spec in specs
    ]
    write_bundle(destination, tensors, config, source, calibration, progress, outline=outline)
    return calibration
