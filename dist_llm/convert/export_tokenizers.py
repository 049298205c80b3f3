"""Write a tokenizer as Hugging Face files: the original files of an imported one, else a conversion of ours.

A conversion is verified: the files are read back, and both libraries encode the same texts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Reference

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import CheckpointError, DataError
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.char_tokenizer import CharTokenizer
from dist_llm.text.hf_bpe import EXPORT_KEY, check_same_ids, convert_bpe, iter_merges, to_printable
from dist_llm.text.hf_folder import SETTINGS_FILE, read_hf_folder
from dist_llm.text.split_pattern import BYTE_LEVEL, build_pre_tokenizer
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer

HINT = "The weights can still be converted, without a tokenizer."


def export_tokenizer(
    tokenizer: BPETokenizer, directory: Path, model: ModelConfig | None = None, extra: int | None = None
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, for `transformers.AutoTokenizer`, into `directory`.

    `extra` is the number of ids that objectives add (`dist_llm/config/lengths.py:extra_ids`); None: all ids of `model`
    beyond the tokenizer's. They become special tokens: `<start>`, `<mask>`, ..., `<sentinel 0>`, ... `<|endoftext|>` is
    eos_token and pad_token. bos_token is `<|endoftext|>` for a decoder and `<start>` for other architectures. `<mask>`
    in a text absorbs the blanks before it, as words do. No id is added before or after a text.

    Ids equal those of `Tokenizer.encode`, with these exceptions. Hugging Face encodes the string of a special token as
    that token, unless loaded with `split_special_tokens=True`. It rejects lone surrogates, decodes an id without a
    token to an empty string, and may split a million consecutive blanks at other positions.

    Raises CheckpointError if the pattern or a token cannot be expressed, or the written files encode differently.
    """
    size = tokenizer.vocab_size
    extra = (model.vocab_size - size if model is not None else 0) if extra is None else extra
    if extra < 0:
        raise CheckpointError(f"model.vocab_size: {size + extra}, but tokenizer {tokenizer.name} has {size} ids.")
    known, special = ObjectiveVocabulary(size, tokenizer.eot), dict(tokenizer.special_tokens)
    for token in range(size, size + extra):
        name = f"{known.describe_added_id(token)}"
        special[name if name not in special else f"<{EXPORT_KEY} {name[1:]}"] = token
    name_of = {token: name for name, token in special.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), ENDOFTEXT),
        EXPORT_KEY: {"name": tokenizer.name, "pattern": tokenizer.pattern, "vocab_size": size},
    }
    roles = {"mask_token": "mask"}
    if model is not None and model.architecture != "decoder":
        roles["bos_token"] = "start"
    settings |= {
        role: name_of[known.special_id(name)] for role, name in roles.items() if known.special_id(name) in name_of
    }
    if model is not None and model.max_seq_len:
        settings["model_max_length"] = model.max_seq_len
    content = _build_content(tokenizer, special, settings.get("mask_token"))
    for file, value in ((TOKENIZER_FILE, content), (SETTINGS_FILE, settings)):
        (directory / file).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _verify_written(tokenizer, special, directory)


def import_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder; an export of ours is read as ours (`read_hf_folder`).

    Raises CheckpointError if files are missing or malformed, or no token ends a document.
    """
    try:
        return read_hf_folder(directory)
    except DataError as error:
        raise CheckpointError(f"{error} {HINT}") from None


def export_files(tokenizer: Tokenizer, directory: Path) -> list[str]:
    """Write the files that the tokenizer was imported with, byte for byte; return their names."""
    files = tokenizer.get_original_files()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return sorted(files)


def export_chars(tokenizer: CharTokenizer, directory: Path) -> None:
    """Write `tokenizer.json` with one id per character. Hugging Face's tokenizer drops characters without an id."""
    model = {"type": "BPE", "vocab": dict(tokenizer.ids), "merges": []}
    content = {"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"}, "model": model}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for file, value in ((TOKENIZER_FILE, content), (SETTINGS_FILE, settings)):
        (directory / file).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    reference, text = Reference.from_file(str(directory / TOKENIZER_FILE)), "".join(tokenizer.ids)
    if (
        reference.encode(text).ids != tokenizer.encode(text).tolist()
        or reference.decode([*tokenizer.encode(text)]) != text
    ):
        raise CheckpointError(f"{directory}: the written tokenizer differs from the tokenizer of characters.")


def _build_content(tokenizer: BPETokenizer, special: Mapping[str, int], mask: str | None) -> dict[str, Any]:
    """Build `tokenizer.json`. Special tokens are in the vocabulary too, because Hugging Face allows no gaps in the ids
    after it."""
    vocab, merges = (
        {to_printable(token): rank for token, rank in tokenizer.ranks.items()},
        list(iter_merges(tokenizer.ranks)),
    )
    if both := vocab.keys() & special.keys():
        raise CheckpointError(f"tokenizer {tokenizer.name}: {min(both)!r} is a special token and an ordinary one.")
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(special.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": name, "lstrip": name == mask, **flags} for name, token in by_id],
        "pre_tokenizer": build_pre_tokenizer(tokenizer.pattern),
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {**vocab, **special}, "merges": merges},
    }


def _verify_written(tokenizer: BPETokenizer, special: Mapping[str, int], directory: Path) -> None:
    """Raise CheckpointError unless the written files are read as `tokenizer`, including each byte and special token."""
    content = json.loads((directory / TOKENIZER_FILE).read_bytes())
    settings = json.loads((directory / SETTINGS_FILE).read_bytes())[EXPORT_KEY]
    try:
        reopened = convert_bpe(content, ENDOFTEXT, settings, tokenizer.name)
        check_same_ids(reopened, content)
    except Exception as error:  # `tokenizers` raises plain exceptions
        raise CheckpointError(f"{directory}: {error}") from None
    if reopened.sha256 != tokenizer.sha256:
        raise CheckpointError(f"{directory}: the written tokenizer differs from tokenizer {tokenizer.name}.")
    reference = Reference.from_file(str(directory / TOKENIZER_FILE))
    byte_ids = [tokenizer.ranks[bytes([byte])] for byte in range(256)]
    for ids, text in (
        (byte_ids, tokenizer.decode(byte_ids)),
        *(([token], name) for name, token in special.items()),
    ):
        if reference.decode(ids, skip_special_tokens=False) != text:
            raise CheckpointError(f"{directory}: {text!r} cannot be expressed in Hugging Face's files.")
