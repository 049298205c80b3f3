"""Convert the byte-level BPE of a Hugging Face `tokenizer.json` to a tokenizer for tiktoken that gives the same ids.

tiktoken merges the neighbours whose combined token has the lowest rank; `tokenizers` follows a list of merges.
`iter_merges` computes this list from the ranks: the merges that build a token do not depend on its neighbours.
`check_same_ids` then runs both libraries on the same texts.
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


def convert_bpe(content: Mapping[str, Any], end_token: str, exported: Mapping[str, Any], name: str) -> BPETokenizer:
    """Convert the content of a `tokenizer.json`. The token `end_token` ends a document; it becomes `<|endoftext|>`.

    `exported` has the values that our own export stored under EXPORT_KEY. The conversion ignores NFC normalization,
    added tokens that are not special, and ids before and after a text.

    Raises CheckpointError if the tokenizer is of another kind, or its ids do not ascend in the order of its merges.
    """
    model = content["model"]
    unsupported_keys = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    kind = " with ".join([model.get("type", "BPE"), *(key for key in unsupported_keys if model.get(key))])
    if kind != "BPE":
        raise CheckpointError(f"its tokenizer is {kind}, not byte-level BPE.")
    pattern = read_pattern(content, exported.get("pattern"))
    vocab: dict[str, int] = model["vocab"]
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens", [])}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    ids_in_merge_order = [vocab["".join(pair)] for pair in merges]
    ordinary, ignore_merges = {*CHAR_TO_BYTE, *map("".join, merges)}, model.get("ignore_merges", False)
    if ignore_merges:  # text that equals a token becomes this token, although no sequence of merges may yield it
        ordinary |= {token for token in vocab if token not in added and CHAR_TO_BYTE.keys() >= set(token)}
    ranks = {to_bytes(token): vocab[token] for token in sorted(ordinary, key=vocab.__getitem__)}
    implied_merges = set(iter_merges(ranks))
    has_unreachable_token = not ignore_merges and len(CHAR_TO_BYTE) + len(implied_merges) < len(ranks)
    if ids_in_merge_order != sorted(ids_in_merge_order) or implied_merges - set(merges) or has_unreachable_token:
        raise CheckpointError(
            "its ids do not ascend in the order of its merges (as in RoBERTa and BART), but our BPE merges by id."
        )
    special = added | {token: rank for token, rank in vocab.items() if token not in ordinary}
    special = {token: rank for token, rank in special.items() if rank < exported.get("vocab_size", rank + 1)}
    if end_token not in special:
        raise CheckpointError(f"{end_token!r}, which ends a document, is not a special token.")
    special[ENDOFTEXT] = special.pop(end_token)
    return BPETokenizer(exported.get("name", name), pattern, ranks, special)


def iter_merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[str, str]]:
    """Yield the last merge of each token that merges can build, as two printable tokens, in the order of ranks."""
    for token in sorted(ranks, key=ranks.__getitem__):
        symbols = [token[index : index + 1] for index in range(len(token))]
        while len(symbols) > 2:
            pair_ranks = [ranks.get(left + right, NO_RANK) for left, right in pairwise(symbols)]
            if (lowest_rank := min(pair_ranks)) == NO_RANK:
                break
            index = pair_ranks.index(lowest_rank)
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
        if len(symbols) == 2:
            yield to_printable(symbols[0]), to_printable(symbols[1])


def check_same_ids(tokenizer: BPETokenizer, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the `tokenizers` library, with `content`, encodes and decodes texts equally.

    The texts are difficult ones, all characters below 256, and all tokens. Special tokens are encoded as text.
    """
    from tokenizers import Tokenizer as LibraryTokenizer

    library_tokenizer = LibraryTokenizer.from_str(json.dumps({**content, "normalizer": None}))
    library_tokenizer.no_truncation()
    library_tokenizer.no_padding()
    library_tokenizer.encode_special_tokens = True
    all_tokens = b" ".join(tokenizer.ranks).decode(errors="ignore")
    for text in (*DIFFICULT_TEXTS, *tokenizer.special_tokens, "".join(map(chr, range(256))), all_tokens):
        ids = tokenizer.encode(text)
        library_ids = library_tokenizer.encode(text, add_special_tokens=False).ids
        library_text = library_tokenizer.decode(library_ids, skip_special_tokens=False)
        if library_ids != ids.tolist() or library_text != tokenizer.decode(ids):
            raise CheckpointError(f"Hugging Face's tokenizer and ours differ on {text[:60]!r}.")


def to_printable(token: bytes) -> str:
    """Return a token as vocabulary files write it: one printable character of GPT-2's byte alphabet per byte."""
    return token.decode("latin-1").translate(BYTE_TO_CHAR)
