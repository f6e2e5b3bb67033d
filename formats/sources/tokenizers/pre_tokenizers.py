"""How byte-level BPEs cut a text into words before merging, by the name that GGUF gives the cut.

A name stands for the patterns of the model's own ``tokenizer.json``, applied one after the other:
each cuts its matches out of every piece so far. llama.cpp knows further names, which are left out
here because patterns alone cannot express them.
"""

from collections.abc import Sequence

from ...bounded_json import JsonObject
from .parts import byte_level, cut_out

_LETTERS = (
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3"
    "-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-"
    "\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-"
    "\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-"
    "\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126"
    "\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00"
    "-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-"
    "\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions, in either case
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_END}"
QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_END}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(upper: str, lower: str, after: str = "") -> str:
    """The pattern of words that begin in upper case, or of words that stay in upper case."""
    front = r"[^\r\n\p{L}\p{N}]?"
    return f"{front}{upper}*{lower}+{after}|{front}{upper}+{lower}*{after}"


GPT4O = rf"{_cased(_UPPER, _LOWER, _SHORT + '?')}|\p{{N}}{{1,3}}|{_END_WITH_SLASH}"
TEKKEN = rf"{_cased(_UPPER, _LOWER)}|\p{{N}}|{_END_WITH_SLASH}"
_UPPER_NOT_HAN, _LOWER_NOT_HAN = (f"{x[:-1]}&&[^\\p{{Han}}]]" for x in (_UPPER, _LOWER))
KIMI = rf"\p{{Han}}+|{_cased(_UPPER_NOT_HAN, _LOWER_NOT_HAN, _SHORT + '?')}|\p{{N}}{{1,3}}|{_END}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
DIGITS = (r"\p{N}", GPT2)
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_SPACES = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))

PATTERNS = {
    **dict.fromkeys(
        ["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4",
         "a.x-4.0", "mellum", "gigachat", "modern-bert", "jina-es", "jina-de", "jina-v2-es",
         "jina-v2-de"],
        (GPT2,),
    ),
    **dict.fromkeys(
        ["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b",
         "mellum2"],
        DIGITS,
    ),
    **dict.fromkeys(
        ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
         "dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5"],
        (LLAMA3,),
    ),
    **dict.fromkeys(
        ["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan",
         "grok-2", "solar-open"],
        (QWEN2,),
    ),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"], DEEPSEEK3),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], (GPT4O,)),
    **dict.fromkeys(["tiny_aya", "cohere2moe"], (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O)),
    **dict.fromkeys(["bloom", "poro-chat", "gpt3-finnish"], (BLOOM,)),
    **dict.fromkeys(
        ["bailingmoe", "bailingmoe2", "llada-moe"],
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
         r"|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    "tekken": (TEKKEN,),
    "kimi-k2": (KIMI,),
    "viking": (BLOOM, r"\p{N}"),
    "jais-2": (
        rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
        r"|\s{1,2}(?!\S)|\s{1}",
    ),
    "qwen35": (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "seed-coder": (
        rf"{_SHORT}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "exaone-moe": (
        rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    "superbpe": (r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}"),
    "deepseek-llm": (
        "[\r\n]",
        rf"\s?[A-Za-z{_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _HAN,
        r"\p{N}",
    ),
}  # fmt: skip
# Names with which texts are normalised to NFC first.
NFC = {"qwen2", "qwen35", "stablelm2", "command-r", "olmo", "mpt"}
_OF_LLAMA3 = {
    "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
}  # fmt: skip
# Names with which a word that is itself a token skips the merges.
WHOLE_WORDS = _OF_LLAMA3 | {"glm4", "glm5", "tekken"}
# Names with which texts begin with the BOS token unless the file says otherwise.
BEGUN = _OF_LLAMA3 | {"tekken"}
# {architecture: the name for its older files, which do not state one}
OLD = {
    "falcon": "falcon", "phi2": "gpt-2", "qwen2": "qwen2", "qwen2moe": "qwen2", "qwen3": "qwen2",
    "qwen3moe": "qwen2",
}  # fmt: skip


def split(patterns: Sequence[str], prefix_space: bool = False) -> JsonObject:
    """The pre-tokenizer of such patterns. With ``prefix_space`` a text gets a space in front."""
    if tuple(patterns) == (GPT2,):  # the byte-level step has this pattern built in
        return byte_level(use_regex=True, prefix_space=prefix_space)
    steps = [*map(cut_out, patterns), byte_level(use_regex=False, prefix_space=prefix_space)]
    return {"type": "Sequence", "pretokenizers": steps}
