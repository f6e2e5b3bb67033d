"""Parts of a ``tokenizer.json`` (dicts) that every kind of tokenizer is made with."""


def added_tokens(ids, special, plain=()):
    """Entries of "added_tokens", by id: tokens that are found in a text before all others.

    ids  {token: id}; special: tokens that are no text, plain: those that are
    """
    return [
        {
            "id": ids[token], "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": token in special,
        }
        for token in sorted({*special, *plain}, key=ids.__getitem__)
    ]  # fmt: skip


def begins_and_ends(first, last, ids):
    """The post-processor that puts these tokens around every text, or None for neither."""
    around = [token for token in (first, last) if token is not None]
    if not around:
        return None
    begin, end = (
        [{"SpecialToken": {"id": token, "type_id": 0}}] if token is not None else []
        for token in (first, last)
    )
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*begin, a, *end],
        "pair": [*begin, a, *end, b],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in around
        },
    }


def cut_out(pattern):
    """A pre-tokenizer that makes what a regular expression matches a word of its own."""
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def byte_level(use_regex, prefix_space=False):
    """The step between bytes and the letters that stand for them.

    use_regex  words are cut as GPT-2's are; prefix_space: a text gets a space in front
    """
    return {
        "type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True,
        "use_regex": use_regex,
    }  # fmt: skip


def byte_level_bpe(vocab, merges, added, pre_tokenizer, nfc=False, around=(None, None),
                   ignore_merges=False):  # fmt: skip
    """A byte-level BPE as GPT-2's.

    vocab          {token: id}; merges: pairs of tokens; added: of ``added_tokens``
    pre_tokenizer  what cuts a text into words, see pre_tokenizers.split
    nfc            a text is brought to the normal form C first
    around         (the token that every text begins with, ends with), or None
    ignore_merges  a word that is a token is taken whole
    """
    ids = {**vocab, **{token["content"]: token["id"] for token in added}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": begins_and_ends(*around, ids) or byte_level(use_regex=True),
        "decoder": byte_level(use_regex=True),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
