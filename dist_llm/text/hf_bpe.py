"""Convert byte-level BPE in a `tokenizer.json` of the `tokenizers` library to an equal tokenizer for tiktoken.

tiktoken merges the neighbours whose combined token has the lowest rank; `tokenizers` follows a list of merges. A token
is always merged in the same way, whatever its neighbours, so merging each token alone yields the list (`iter_merges`).
`prove_equal` then runs both libraries on the same texts.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from dist_llm.errors import CheckpointError
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.byte_alphabet import BYTE_TO_CHAR, CHAR_TO_BYTE, to_bytes
from dist_llm.text.difficult_texts import DIFFICULT_TEXTS
from dist_llm.text.split_pattern import read_pattern
from dist_llm.text.tokenizer import ENDOFTEXT

EXPORT_KEY = "dist_llm"  # key in tokenizer_config.json for values that the `tokenizers` format cannot store
NO_RANK = 1 << 62  # larger than any rank


def convert_bpe(content: Mapping[str, Any], end: str, exported: Mapping[str, Any], name: str) -> BPETokenizer:
    """Convert a `tokenizer.json`. Its token `end`, which ends a document, is renamed to `<|endoftext|>`.

    `exported` has the values that our own export stored under EXPORT_KEY. The conversion ignores Unicode's form NFC,
    added tokens that are not special, and ids before and after a text.

    Raises CheckpointError if the tokenizer is of another kind, or its ids do not ascend in the order of its merges.
    """
    model = content["model"]
    foreign = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    kind = " with ".join([model.get("type", "BPE"), *(key for key in foreign if model.get(key))])
    if kind != "BPE":
        raise CheckpointError(f"its tokenizer is {kind}, not byte-level BPE.")
    pattern = read_pattern(content, exported.get("pattern"))
    vocab: dict[str, int] = model["vocab"]
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens", [])}
    merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    order = [vocab["".join(pair)] for pair in merges]
    ordinary, ignore_merges = {*CHAR_TO_BYTE, *map("".join, merges)}, model.get("ignore_merges", False)
    if ignore_merges:  # a piece of text that equals a token becomes this token, even if no sequence of merges yields it
        ordinary |= {token for token in vocab if token not in added and CHAR_TO_BYTE.keys() >= set(token)}
    ranks = {to_bytes(token): vocab[token] for token in sorted(ordinary, key=vocab.__getitem__)}
    implied = set(iter_merges(ranks))
    never_made = not ignore_merges and len(CHAR_TO_BYTE) + len(implied) < len(ranks)
    if order != sorted(order) or implied - set(merges) or never_made:
        raise CheckpointError(
            "its ids do not ascend in the order of its merges (nor do RoBERTa's and BART's), and ours merges by id."
        )
    special = added | {token: rank for token, rank in vocab.items() if token not in ordinary}
    special = {token: rank for token, rank in special.items() if rank < exported.get("vocab_size", rank + 1)}
    if end not in special:
        raise CheckpointError(f"{end!r}, which ends a document, is not a special token.")
    special[ENDOFTEXT] = special.pop(end)
    return BPETokenizer(exported.get("name", name), pattern, ranks, special)


def iter_merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[str, str]]:
    """Yield the last merge (two printable parts) of each token that merging reaches, in the order of ranks."""
    for token in sorted(ranks, key=ranks.__getitem__):
        symbols = [token[index : index + 1] for index in range(len(token))]
        while len(symbols) > 2:
            pair_ranks = [ranks.get(left + right, NO_RANK) for left, right in pairwise(symbols)]
            if (least := min(pair_ranks)) == NO_RANK:
                break
            index = pair_ranks.index(least)
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
        if len(symbols) == 2:
            yield to_printable(symbols[0]), to_printable(symbols[1])


def prove_equal(tokenizer: BPETokenizer, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless `tokenizers`, with `content`, encodes and decodes ordinary text as ours does."""
    from tokenizers import Tokenizer as Reference

    reference = Reference.from_str(json.dumps({**content, "normalizer": None}))
    reference.no_truncation()
    reference.no_padding()
    reference.encode_special_tokens = True
    tokens = b" ".join(tokenizer.ranks).decode(errors="ignore")
    for text in (*DIFFICULT_TEXTS, *tokenizer.special_tokens, "".join(map(chr, range(256))), tokens):
        ids = tokenizer.encode(text)
        reference_ids = reference.encode(text, add_special_tokens=False).ids
        if reference_ids != ids.tolist() or reference.decode(
            reference_ids, skip_special_tokens=False
        ) != tokenizer.decode(ids):
            raise CheckpointError(f"Hugging Face's tokenizer and ours differ on {text[:60]!r}.")


def to_printable(token: bytes) -> str:
    """Return a token in the form of the files: GPT-2's printable character for each byte."""
    return token.decode("latin-1").translate(BYTE_TO_CHAR)
