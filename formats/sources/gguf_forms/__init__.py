"""How GGUF holds the models of each architecture: one ``GgufForm`` each.

``FORMS`` has them by GGUF's name. A form states where its architecture differs from what most of
them share: names of tensors and how they are packed (form.py), fields of the config (fields.py),
rotary positions (rope.py), and metadata that changes no result (``gguf_metadata``). A metadata key
that none of these reads or knows is refused.
"""

from .dense import DENSE
from .form import GgufForm
from .hybrids import HYBRIDS
from .latent import LATENT
from .mixtures import MIXTURES
from .recurrent import RECURRENT

FORMS: dict[str, GgufForm] = {
    form.architecture: form for form in (*DENSE, *MIXTURES, *LATENT, *HYBRIDS, *RECURRENT)
}
