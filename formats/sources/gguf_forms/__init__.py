"""How GGUF holds the models of each architecture: one ``GgufForm`` each.

``FORMS`` has them by GGUF's name. A form states where its architecture differs from what most of
them share: names of tensors and how they are packed (form.py), fields of the config (fields.py),
rotary positions (rope.py), and metadata that changes no result (``gguf_metadata``). A metadata key
that none of these reads or knows is refused. ``TEXTS`` has the texts of models that see images,
which are models of FORMS under names of their own.
"""

from dataclasses import replace

from ...bounded_json import JsonObject
from .dense import DENSE
from .form import GgufForm
from .gemma3n import GEMMA3N
from .gemma4 import GEMMA4
from .header import Header
from .hybrids import HYBRIDS
from .latent import LATENT
from .mixtures import MIXTURES
from .recurrent import RECURRENT

FORMS: dict[str, GgufForm] = {
    form.architecture: form
    for form in (*DENSE, *GEMMA3N, *GEMMA4, *MIXTURES, *LATENT, *HYBRIDS, *RECURRENT)
}
# Which rotary positions stand for places in an image, and into how many layers images go: of a text
# all positions are the same, and there are no images.
OF_IMAGES = ("rope.dimension_sections", "n_deepstack_layers")


def _text_of(form: GgufForm, architecture: str) -> GgufForm:
    """The form of the text of a model that sees images, which but for OF_IMAGES is ``form``."""

    def fields(header: Header, config: JsonObject) -> JsonObject:
        header.known.update(OF_IMAGES)
        return form.fields(header, config)

    return replace(form, architecture=architecture, fields=fields)


TEXTS: dict[str, GgufForm] = {
    name: _text_of(FORMS[text], name)
    for name, text in (("qwen2vl", "qwen2"), ("qwen3vl", "qwen3"), ("qwen3vlmoe", "qwen3moe"))
}
