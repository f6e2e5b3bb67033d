"""A process of its own that reads untrusted tokenizers and chat templates, within limits.

Both come from untrusted files, and neither of the libraries that read them bounds its memory or its
time: a tokenizer may ask for terabytes of padding, a template for a day of loops. worker.py runs
this file as a script. It imports nothing of this package, so that it takes only some 15 MB.

It answers one request after the other until its input ends. A message is a line of JSON, followed
by the number of bytes that its "nbytes" states. A request names what to "do", and the bytes of
"memory" and the CPU's "seconds" that it may take. An answer to a failed request has an "error", one
line.
"""

import datetime
import json
import os
import resource
import sys
from importlib import import_module
from typing import Any

Message = dict[str, Any]  # a request or an answer
Step = dict[str, Any]  # one of a decoder's steps
loaded: dict[str, Any] = {}  # the tokenizer and the template that requests use


class Refused(Exception):
    """A request cannot be fulfilled; the message says why."""


def load(request: Message, _: bytes) -> tuple[Message, bytes]:
    """Read a ``tokenizer.json`` from ``path`` at ``offset``, ``length`` bytes.

    The answer's bytes are the pieces that ``pieces`` makes, one after the other; ``lengths`` are
    theirs, and ``forms`` is the number of tables.
    """
    import tokenizers

    with open(request["path"], "rb") as file:
        file.seek(request["offset"])
        inner = tokenizers.Tokenizer.from_buffer(file.read(request["length"]))
    # Padding and truncation are for batches; a single text keeps exactly its tokens.
    inner.no_padding()
    inner.no_truncation()
    loaded["tokenizer"] = inner
    tables, answer = pieces(inner, request["length"])
    data = b"".join(b"".join(table) for table in tables)
    lengths = [len(piece) for table in tables for piece in table]
    return {**answer, "lengths": lengths, "forms": len(tables)}, data


def pieces(inner: Any, most: int) -> tuple[list[list[bytes]], Message]:
    """(tables of the bytes that each token id adds to a text, further parts of the answer).

    inner  the library's tokenizer
    most   bounds the bytes of a table, and the ids
    A second table is for the first token of a text, where the decoder treats that differently. The
    answer's ``silent`` are the ids of special tokens, which add nothing; ``strip`` is the number of
    spaces that a text loses at its beginning.
    """
    tokens = {i: token for token, i in inner.get_vocab(with_added_tokens=False).items()}
    added = inner.get_added_tokens_decoder()
    tokens.update((i, token.content) for i, token in added.items())
    n = max(tokens, default=-1) + 1
    if n > most:
        raise Refused(f"it has the token id {n - 1}")
    silent = [i for i, token in added.items() if token.special]
    silent += [i for i in range(n) if i not in tokens]
    steps, strip = decoder_steps(inner.decoder)
    forms = [False] if all(step["type"] in PLACELESS for step in steps) else [False, True]
    made, left = [], len(forms) * most
    for first in forms:
        table = []
        for i in range(n):
            piece = decoded(tokens[i], steps, first) if i in tokens else b""
            table.append(piece)
            left -= len(piece)
            if left < 0:
                raise Refused("its decoder makes more text than its vocabulary has")
        made.append(table)
    return made, {"silent": silent, "strip": strip}


# The steps of a decoder that treat the first token of a text like any other.
PLACELESS = ("ByteLevel", "Replace", "ByteFallback", "Strip")


def decoder_steps(decoder: Any) -> tuple[list[Step], int]:
    """(a decoder's steps for each token, the spaces that the text loses at its beginning)."""
    if decoder is None:
        return [{"type": "Spaces"}], 0
    steps: list[Step] = []
    strip, fused = 0, False
    for step in flat(json.loads(decoder.__getstate__())):
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and step["content"] == " " and not step["stop"]:
            strip += step["start"]
        elif fused:
            raise Refused(f"its decoder, {kind} after Fuse, is not supported")
        elif kind == "Replace" and not step["pattern"].get("String"):
            raise Refused("its decoder replaces a pattern that is no plain text; not supported")
        elif kind in (*PLACELESS, "Metaspace", "WordPiece"):
            steps.append(step)
            fused = kind == "ByteLevel"
        else:
            raise Refused(f"its decoder, {kind}, is not supported")
        if any(earlier["type"] == "ByteFallback" for earlier in steps[:-1]):
            raise Refused(f"its decoder, {kind} after ByteFallback, is not supported")
    return steps, strip


def flat(step: Step) -> list[Step]:
    """The steps of a decoder, with sequences resolved."""
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in flat(part)]


def decoded(token: str, steps: list[Step], first: bool) -> bytes:
    """The bytes of a token within a text, or as the ``first`` token of a text."""
    for step in steps:
        kind = step["type"]
        if kind == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Strip":
            token = stripped(token, step)
        elif kind == "Metaspace":
            drop = first and step.get("prepend_scheme", "always") != "never"
            token = token.replace(step["replacement"], "" if drop else " ")
        elif kind == "WordPiece":
            token = of_word_piece(token, step, first)
        elif kind == "Spaces":
            token = token if first else f" {token}"
        elif kind == "ByteLevel":
            if LETTERS.issuperset(token):
                return token.translate(BYTES).encode("latin-1")
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # ByteFallback
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
    return token.encode("utf-8")


def stripped(token: str, step: Step) -> str:
    start, stop = 0, len(token)
    while start < min(step["start"], stop) and token[start] == step["content"]:
        start += 1
    end = stop
    while end > max(start, stop - step["stop"]) and token[end - 1] == step["content"]:
        end -= 1
    return token[start:end]


def of_word_piece(token: str, step: Step, first: bool) -> str:
    if not first:
        continues = token.startswith(step["prefix"])
        token = token[len(step["prefix"]) :] if continues else f" {token}"
    if step["cleanup"]:
        for text in (" .", " ?", " !", " ,"):
            token = token.replace(text, text[1:])
        for text, shorter in ((" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" do not", " don't"),
                              (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):  # fmt: skip
            token = token.replace(text, shorter)
    return token


# The letters of byte-level BPEs: printable bytes stand for themselves, the letters from 256 on for
# the other bytes.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = dict(enumerate((b for b in range(256) if b not in PRINTABLE), 256))
LETTERS = {chr(code) for code in (*PRINTABLE, *BYTES)}


def encode(request: Message, data: bytes) -> tuple[Message, bytes]:
    """The token ids of a text; with ``special`` also those that every text begins or ends with."""
    ids = loaded["tokenizer"].encode(
        data.decode("utf-8"), add_special_tokens=request["special"]
    ).ids  # fmt: skip
    return {"ids": ids}, b""


def template(_: Message, data: bytes) -> tuple[Message, bytes]:
    """Take a chat template for later conversations.

    Templates are written for transformers, so its filters, functions and tags are defined here.
    """
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the model's own text, which is left as it is."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it of this type

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    loaded["template"] = environment.from_string(data.decode("utf-8"))
    return {}, b""


def render(request: Message, data: bytes) -> tuple[Message, bytes]:
    """The token ids of a conversation; None where it has more than ``characters_at_most``."""
    special = {
        role: loaded["tokenizer"].id_to_token(token) if isinstance(token, int) else token
        for role, token in request["special"].items()
    }
    text = loaded["template"].render(
        messages=json.loads(data), add_generation_prompt=True,
        **{role: token or "" for role, token in special.items()},
    )  # fmt: skip
    if len(text) > request["characters_at_most"]:
        return {"ids": None}, b""
    return {"ids": loaded["tokenizer"].encode(text, add_special_tokens=False).ids}, b""


LIBRARIES = {"load": ["tokenizers"], "template": ["jinja2", "jinja2.sandbox", "jinja2.ext"]}
REQUESTS = {f.__name__: f for f in (load, encode, template, render)}


def limit(request: Message) -> None:
    """Limit this process to the memory and the CPU's seconds of a request, which begin now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + 1 + request["seconds"]
    for kind, most in ((resource.RLIMIT_AS, request["memory"]), (resource.RLIMIT_CPU, cpu)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, hard))


def main() -> None:
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while line := source.readline():
        try:
            request = json.loads(line)
            data = source.read(request["nbytes"])
            for library in LIBRARIES.get(request["do"], ()):
                import_module(library)
            limit(request)
            answer, out = REQUESTS[request["do"]](request, data)
        except MemoryError:
            answer, out = {"error": "it takes too much memory", "of_memory": True}, b""
        except BaseException as error:  # a panic in Rust is not an Exception
            answer, out = {"error": (str(error) or type(error).__name__)[:1000]}, b""
        answers.write(json.dumps({**answer, "nbytes": len(out)}).encode() + b"\n" + out)
        answers.flush()


if __name__ == "__main__":
    # The process starts without this file's directory on the path, so that no file of this package
    # shadows a library.
    sys.path[:] = json.loads(os.environ.pop("FLASHINFER_WORKER_PATH"))
    main()
