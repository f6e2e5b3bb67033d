"""Synthetic models of real shapes, to measure a board before downloading a real one.

Random weights, but a consistent model: it fires for a given share of neurons, or chooses experts
with a given locality; its predictor is right, and dense and predicted runs give the same tokens.

How: the hidden states carry a code c_t, |c_t| = 1, that turns along the sequence, in a subspace
Q that nothing else writes to. What chooses neurons or experts looks at that subspace through a
random direction each, so its scores are about b_i . c_t, and how fast the code turns steers how
many are new at a token. Learned positions bring the code; where there are none the tokens do, and
the output head makes token t + 1 follow token t.
"""

from flashinfer.formats.architectures import model_config
from flashinfer.formats.bundle.layout import SMALL, format_of, layout, predictor_layout
from flashinfer.formats.bundle.writer import new_tensor, write_bundle
from flashinfer.formats.errors import UserError
from flashinfer.formats.number_formats import number_format
from flashinfer.synth.experts import ExpertMaker
from flashinfer.synth.maker import SIMULATED_TOKENS
from flashinfer.synth.neurons import NeuronMaker

__all__ = ["synthesize"]


def synthesize(
    destination, config, dtype="f16", active=0.03, fresh=0.024, seed=0, progress=None,
    dense_dtype=None, repeated=0.4,
):  # fmt: skip
    """Write a synthetic bundle of a Hugging Face config; return its calibration.

    active    share of a layer's neurons that fire for a token
    fresh     share of the layer that fires and did not for the last five tokens
    progress  called as progress(bytes_written, bytes_in_all)
    dense_dtype  number format of what is not FFN, where it is to be another than ``dtype``
    repeated  of a mixture: share of a token's experts that the token before it used, too

    Memory: some tens of MB and one square matrix of hidden_size. Raises UserError where the
    shares cannot be had, or the model's activation leaves no neuron silent.
    """
    model = model_config(config)
    if not (model.sparse or model.experts) or (model.tied and model.positions != "learned"):
        raise UserError(
            "a synthetic model needs a ReLU or experts, and without learned positions an untied "
            "output head"
        )
    ffn, dense = number_format(dtype), number_format(dense_dtype or dtype)
    source = {"synthetic": True, "seed": seed}
    specs = layout(model)
    if model.experts:
        maker = ExpertMaker(model, repeated, seed)
        source["repeated"] = repeated
    else:
        maker = NeuronMaker(model, active, fresh, seed)
        source.update(active=active, fresh=fresh)
        small = sum(spec.role == SMALL for spec in specs)
        specs[small:small] = predictor_layout(model, [maker.rank] * model.num_hidden_layers)
    calibration = {
        "text": f"synthetic, seed {seed}",
        "tokens": SIMULATED_TOKENS,
        "layers": [maker.record(layer) for layer in range(model.num_hidden_layers)],
    }
    tensors = [
        new_tensor(
            spec.name,
            format_of(spec, ffn, dense),
            spec.shape,
            lambda spec=spec: maker.chunks(spec),
        )
        for spec in specs
    ]
    total = sum(tensor.nbytes for tensor in tensors)
    write_bundle(
        destination,
        tensors,
        config,
        source=source,
        calibration=calibration,
        progress=(lambda nbytes: progress(nbytes, total)) if progress else lambda nbytes: None,
    )
    return calibration
