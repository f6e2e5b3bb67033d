"""Many texts written together, so that they share each pass and what it reads (the throughput case
of FlexGen, Sheng et al. 2023).

A pass takes the next token of each text that is being written, and as much of new texts' prompts as
it has room for (Orca's iterations, Yu et al. 2022). A text that is done makes room for the next
one. Texts that begin alike process their common beginning once.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from flashinfer.formats.arrays import Float32Array
from flashinfer.generation.sampling import Sampler
from flashinfer.transformer.text import Part, Text, in_common

LEAST_SHARED = 4  # tokens of a common beginning that are worth copying


@dataclass
class Request:
    """A text to be written.

    number      by which it is told from the others
    prompt      its token ids, one or more
    most        tokens to write, one or more
    sampler     draws them; ends: the tokens that end the text
    """

    number: int
    prompt: list[int]
    most: int
    sampler: Sampler
    ends: Collection[int] = ()


@dataclass
class Writing:
    """A Request in the making, in a Text of the model.

    source, shared  the text to copy the first ``shared`` tokens from, once it has processed them,
            or None
    """

    request: Request
    text: Text
    source: Text | None = None
    shared: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens that are known and not yet processed."""
        return len(self.request.prompt) + len(self.token_ids) - self.text.position

    def next_ids(self, n: int) -> list[int]:
        """The next n tokens to process."""
        at, prompt = self.text.position, self.request.prompt
        if at < len(prompt):  # no token is drawn before the prompt is done
            return prompt[at : at + n]
        return self.token_ids[at - len(prompt) :][:n]

    def draw(self, logits: Float32Array) -> bool:
        """Draw the next token from logits (vocab_size,); whether it was the last."""
        self.token_ids.append(self.request.sampler(logits))
        return len(self.token_ids) == self.request.most or self.token_ids[-1] in self.request.ends


class Batch:
    """Gives each pass its tokens.

    texts     of the model, which are filled in turn
    requests  are asked for one by one, when there is room for another
    most      tokens of a pass, at least one for each text
    """

    def __init__(self, texts: Sequence[Text], requests: Iterable[Request], most: int) -> None:
        self.free, self.requests, self.most = list(texts), iter(requests), most
        self.writing: list[Writing] = []
        self.taken: list[Writing] = []  # those of the last pass

    def parts(self) -> list[Part]:
        """The next pass; none where all texts are written."""
        self._copy_beginnings()
        self._admit()
        ready = [one for one in self.writing if one.source is None]
        room, self.taken, parts = self.most, [], []
        # Those that write first, each of which takes one token.
        for one in sorted(ready, key=lambda one: one.left):
            n = min(one.left, room)
            if n:
                self.taken.append(one)
                parts.append(Part(one.text, np.array(one.next_ids(n), dtype=np.int64)))
                room -= n
        return parts

    def rows(self, parts: Sequence[Part]) -> list[int]:
        """Which rows of a pass, now processed, give a text's next token."""
        ends = np.cumsum([len(part.ids) for part in parts]) - 1
        return [int(end) for end, one in zip(ends, self.taken, strict=True) if not one.left]

    def draw(self, logits: Float32Array) -> Iterator[Writing]:
        """Draw a token from each of the rows' logits (rows, vocab_size); yields the texts that are
        done, whose Texts are free again."""
        drawing = [one for one in self.taken if not one.left]
        for one, row in zip(drawing, logits, strict=True):
            if one.draw(row):
                self.writing.remove(one)
                self.free.append(one.text)
                yield one

    def _admit(self) -> None:
        """Begin as many texts as there is room for."""
        while self.free and (request := next(self.requests, None)) is not None:
            self.writing.append(self._begun(request))

    def _begun(self, request: Request) -> Writing:
        """A text begun with what of its beginning is in DRAM already, or will soon be."""
        before = request.prompt[:-1]  # the last token must be processed, as it gives the next one
        own = max(self.free, key=lambda text: text.in_common(before))
        self.free.remove(own)
        kept, source, shared = own.in_common(before), None, 0
        others = [(one.text, one.request.prompt) for one in self.writing]
        for text, ids in [*others, *((text, text.ids) for text in self.free)]:
            common = in_common(ids, before)
            if common > max(kept, shared) and common >= LEAST_SHARED:
                source, shared = text, common
        del own.ids[kept:]
        one = Writing(request, own, source, shared)
        self._copy_beginning(one)
        return one

    def _copy_beginnings(self) -> None:
        for one in self.writing:
            self._copy_beginning(one)

    def _copy_beginning(self, one: Writing) -> None:
        """Copy the common beginning, where it has been processed."""
        if one.source is not None and one.source.position >= one.shared:
            one.text.copy(one.source, one.shared)
            one.source = None
