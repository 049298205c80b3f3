"""Our tokenizer as Hugging Face's files, and theirs as ours: byte-level BPE both ways, and nothing that differs.

Ours merges whatever neighbours make the token of least rank; theirs follows a list of pairs. A token is always made
in the same way, whatever stands around it, so making each alone finds the list (`_pairs`). Both functions end by
running the two libraries on the same texts.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Reference

from dist_llm.config.schema import ModelConfig
from dist_llm.convert.pattern import BYTE_LEVEL, pattern_of, pre_tokenizer
from dist_llm.errors import CheckpointError, DataError
from dist_llm.objectives.objective_vocabulary import Vocabulary
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer
from dist_llm.text.vocabulary import BYTE_OF, TRICKY_TEXTS, to_bytes

SETTINGS_FILE = "tokenizer_config.json"
OURS = "dist_llm"  # the key of SETTINGS_FILE that keeps what their files have no place for
DOCUMENT_ENDS = (ENDOFTEXT, "<|end_of_text|>")  # looked for before the eos, which in chat models ends a turn
NO_TOKENIZER = "The weights can still be converted, without a tokenizer."

NONE = 1 << 62  # more than any rank
SIGN_OF = {byte: sign for sign, byte in BYTE_OF.items()}


def export_tokenizer(
    tokenizer: Tokenizer, directory: Path, model: ModelConfig | None = None, extra: int | None = None
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, for `transformers.AutoTokenizer`, into `directory`.

    `extra` counts the ids that objectives add (`dist_llm/config/lengths.py:extra_ids`); None: all that `model` has
    beyond the tokenizer's. They become special tokens: `<start>`, `<mask>`, ..., `<sentinel 0>`, ... `<|endoftext|>`
    is eos_token and pad_token, and bos_token too where the model is a decoder; else that is `<start>`. A
    `<mask>` in a text takes the blanks before it, as words do. No id is put before or after a text.

    Ids are those of `Tokenizer.encode` but for this: Hugging Face takes the string of a special token for the token,
    unless loaded with `split_special_tokens=True`. It refuses lone surrogates, decodes an id without a token to
    nothing, and may cut a million blanks in a row elsewhere.

    Raises CheckpointError where the pattern or a token has no equal there, or what was written reads differently.
    """
    size = tokenizer.vocab_size
    extra = (model.vocab_size - size if model is not None else 0) if extra is None else extra
    if extra < 0:
        raise CheckpointError(f"model.vocab_size: {size + extra}, but tokenizer {tokenizer.name} has {size} ids.")
    known, special = Vocabulary(size, tokenizer.eot), dict(tokenizer.special_tokens)
    for token in range(size, size + extra):
        name = f"{known.describe(token)}"
        special[name if name not in special else f"<{OURS} {name[1:]}"] = token
    name_of = {token: name for name, token in special.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), ENDOFTEXT),
        OURS: {"name": tokenizer.name, "pattern": tokenizer.pattern, "vocab_size": size},
    }
    roles = {"mask_token": "mask"}
    if model is not None and model.architecture != "decoder":
        roles["bos_token"] = "start"
    settings |= {role: name_of[known.special(name)] for role, name in roles.items() if known.special(name) in name_of}
    if model is not None and model.max_seq_len:
        settings["model_max_length"] = model.max_seq_len
    content = _content(tokenizer, special, settings.get("mask_token"))
    for file, value in ((TOKENIZER_FILE, content), (SETTINGS_FILE, settings)):
        (directory / file).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _prove_reopened(tokenizer, special, directory)


def import_tokenizer(directory: Path) -> Tokenizer:
    """Our form of the tokenizer in a Hugging Face folder: byte-level BPE in `tokenizer.json`, or GPT-2's two files.

    The token that ends a document gets the name `<|endoftext|>`. What they may do around the merging is left out:
    Unicode's form NFC (Qwen), for which texts have to be in that form already, and ids before and after a text.

    Raises CheckpointError where files are missing or malformed, the tokenizer is of another kind, or its ids do not
    rise in the order of its merges: ours merges by id.
    """
    path, settings_path = directory / TOKENIZER_FILE, directory / SETTINGS_FILE
    try:
        settings = _read(settings_path) if settings_path.is_file() else {}
        content = _read(path) if path.is_file() else _from_two_files(directory)
        tokenizer = _tokenizer(content, settings, directory.name)
        _prove_equal(tokenizer, content)
    except (CheckpointError, DataError) as error:
        raise CheckpointError(f"{directory}: {error} {NO_TOKENIZER}") from None
    except Exception as error:  # of no class of its own, where it comes from `tokenizers`
        raise CheckpointError(f"{directory}: its tokenizer cannot be read: {error!r}. {NO_TOKENIZER}") from None
    return tokenizer


def _content(tokenizer: Tokenizer, special: Mapping[str, int], mask: str | None) -> dict[str, Any]:
    """What `tokenizer.json` says. Special tokens are in the vocabulary too, since theirs knows no gaps beyond it."""
    vocab, merges = {_signs(token): rank for token, rank in tokenizer.ranks.items()}, list(_pairs(tokenizer.ranks))
    if both := vocab.keys() & special.keys():
        raise CheckpointError(f"tokenizer {tokenizer.name}: {min(both)!r} is a special token and an ordinary one.")
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(special.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": name, "lstrip": name == mask, **flags} for name, token in by_id],
        "pre_tokenizer": pre_tokenizer(tokenizer.pattern),
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {**vocab, **special}, "merges": merges},
    }


def _pairs(ranks: Mapping[bytes, int]) -> Iterator[tuple[str, str]]:
    """The last two parts, in signs, of each token that merging reaches, in the order of ranks."""
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            found = [ranks.get(left + right, NONE) for left, right in pairwise(parts)]
            if (least := min(found)) == NONE:
                break
            place = found.index(least)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            yield _signs(parts[0]), _signs(parts[1])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _from_two_files(directory: Path) -> dict[str, Any]:
    """vocab.json and merges.txt as the `tokenizer.json` that stands for them."""
    if not (directory / "merges.txt").is_file():
        raise CheckpointError(f"no {TOKENIZER_FILE}, nor vocab.json and merges.txt.")
    lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    model = {"type": "BPE", "vocab": _read(directory / "vocab.json"), "merges": merges}
    return {"version": "1.0", "pre_tokenizer": {**BYTE_LEVEL, "use_regex": True}, "decoder": BYTE_LEVEL, "model": model}


def _tokenizer(content: Mapping[str, Any], settings: Mapping[str, Any], name: str) -> Tokenizer:
    model, kept = content["model"], settings.get(OURS) or {}
    foreign = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    kind = " with ".join([model.get("type", "BPE"), *(key for key in foreign if model.get(key))])
    if kind != "BPE":
        raise CheckpointError(f"its tokenizer is {kind}, not byte-level BPE.")
    pattern = pattern_of(content, kept.get("pattern"))
    vocab: dict[str, int] = model["vocab"]
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens", [])}
    merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    order = [vocab["".join(pair)] for pair in merges]
    ordinary, whole_pieces = {*BYTE_OF, *map("".join, merges)}, model.get("ignore_merges", False)
    if whole_pieces:  # a piece of text that is a token is that token, however it is made
        ordinary |= {token for token in vocab if token not in added and BYTE_OF.keys() >= set(token)}
    ranks = {to_bytes(token): vocab[token] for token in sorted(ordinary, key=vocab.__getitem__)}
    implied = set(_pairs(ranks))
    never_made = not whole_pieces and len(BYTE_OF) + len(implied) < len(ranks)
    if order != sorted(order) or implied - set(merges) or never_made:
        raise CheckpointError(
            "its ids do not rise in the order of its merges (nor do RoBERTa's and BART's), and ours merges by id."
        )
    special = added | {token: rank for token, rank in vocab.items() if token not in ordinary}
    special = {token: rank for token, rank in special.items() if rank < kept.get("vocab_size", rank + 1)}
    eos = settings.get("eos_token")
    ends = [*DOCUMENT_ENDS, eos["content"] if isinstance(eos, dict) else eos, "</s>"]
    if not (found := [end for end in ends if end in special]):
        raise CheckpointError(f"no token that ends a document: none of {ends} is special.")
    special[ENDOFTEXT] = special.pop(found[0])
    return Tokenizer(kept.get("name", name), pattern, ranks, special)


def _prove_equal(tokenizer: Tokenizer, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless `tokenizers`, given `content`, encodes and decodes ordinary text as ours does."""
    added = [{**token, "special": True} for token in content.get("added_tokens", [])]
    reference = Reference.from_str(json.dumps({**content, "normalizer": None, "added_tokens": added}))
    reference.encode_special_tokens = True
    tokens = b" ".join(tokenizer.ranks).decode(errors="ignore")
    for text in (*TRICKY_TEXTS, *tokenizer.special_tokens, "".join(map(chr, range(256))), tokens):
        ids = tokenizer.encode(text)
        theirs = reference.encode(text, add_special_tokens=False).ids
        if theirs != ids.tolist() or reference.decode(theirs, skip_special_tokens=False) != tokenizer.decode(ids):
            raise CheckpointError(f"Hugging Face's tokenizer and ours differ on {text[:60]!r}.")


def _prove_reopened(tokenizer: Tokenizer, special: Mapping[str, int], directory: Path) -> None:
    """Raise CheckpointError unless what was written reads as `tokenizer`, every byte and special token too."""
    if import_tokenizer(directory).sha256 != tokenizer.sha256:
        raise CheckpointError(f"{directory}: what was written is not tokenizer {tokenizer.name}.")
    reference = Reference.from_file(str(directory / TOKENIZER_FILE))
    every_byte = [tokenizer.ranks[bytes([byte])] for byte in range(256)]
    for ids, text in (
        (every_byte, tokenizer.decode(every_byte)),
        *(([token], name) for name, token in special.items()),
    ):
        if reference.decode(ids, skip_special_tokens=False) != text:
            raise CheckpointError(f"{directory}: {text!r} has no equal in Hugging Face's files.")


def _signs(token: bytes) -> str:
    return token.decode("latin-1").translate(SIGN_OF)
