"""Write a tokenizer as Hugging Face files, or read one for the conversion of a checkpoint.

An imported tokenizer is written back with its original files. A tokenizer of dist_llm is converted and verified: the
files are read back, and both libraries must encode the same texts equally. `import_tokenizer` reads the files of both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from dist_llm.config.model_section import ModelConfig
from dist_llm.errors import CheckpointError, DataError
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.char_tokenizer import CharTokenizer
from dist_llm.text.hf_bpe import EXPORT_KEY, check_same_ids, convert_bpe, iter_merges, to_printable
from dist_llm.text.hf_folder import SETTINGS_FILE, read_hf_folder
from dist_llm.text.split_pattern import BYTE_LEVEL, build_pre_tokenizer
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer

NO_TOKENIZER_HINT = "The weights can still be converted, without a tokenizer."


def export_tokenizer(
    tokenizer: BPETokenizer, directory: Path, model: ModelConfig | None = None, num_extra_ids: int | None = None
) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, for `transformers.AutoTokenizer`, into `directory`.

    `num_extra_ids` is the number of ids that objectives add (`config/sequence_lengths.py:count_objective_ids`). By
    default, it is the number of ids that `model` has but the tokenizer lacks. These ids become special tokens such as
    `<start>`, `<mask>` and `<sentinel 0>`.

    - eos_token and pad_token are `<|endoftext|>`.
    - bos_token is `<|endoftext|>` for a decoder and `<start>` for other architectures.
    - The exported tokenizer adds no id before or after a text.
    - `<mask>` in a text absorbs the whitespace before it.

    The exported tokenizer encodes a text to the same ids as `Tokenizer.encode`, with these exceptions:

    - The text of a special token becomes this token, unless the tokenizer is loaded with `split_special_tokens=True`.
    - A lone surrogate is an error. An id without a token is decoded to an empty text.
    - A million consecutive blanks may be split at other positions.

    Raises CheckpointError if the pattern or a token cannot be expressed, or the written files encode differently.
    """
    num_ids = tokenizer.vocab_size
    if num_extra_ids is None:
        num_extra_ids = model.vocab_size - num_ids if model is not None else 0
    if num_extra_ids < 0:
        raise CheckpointError(
            f"model.vocab_size: {num_ids + num_extra_ids}, but tokenizer {tokenizer.name} has {num_ids} ids."
        )
    vocabulary, special_ids = ObjectiveVocabulary(num_ids, tokenizer.eot), dict(tokenizer.special_tokens)
    for token_id in range(num_ids, num_ids + num_extra_ids):
        name = str(vocabulary.describe_added_id(token_id))
        # If the corpus has the same name: `<dist_llm mask>` instead of `<mask>`.
        special_ids[name if name not in special_ids else f"<{EXPORT_KEY} {name[1:]}"] = token_id
    settings = _build_settings(tokenizer, vocabulary, special_ids, model)
    tokenizer_json = _build_tokenizer_json(tokenizer, special_ids, settings.get("mask_token"))
    _write_tokenizer_files(directory, tokenizer_json, settings)
    _verify_written(tokenizer, special_ids, directory)


def _build_settings(
    tokenizer: BPETokenizer,
    vocabulary: ObjectiveVocabulary,
    special_ids: Mapping[str, int],
    model: ModelConfig | None,
) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`. `special_ids` has the id of each special token."""
    special_names = {token_id: name for name, token_id in special_ids.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), ENDOFTEXT),
        EXPORT_KEY: {"name": tokenizer.name, "pattern": tokenizer.pattern, "vocab_size": tokenizer.vocab_size},
    }
    roles = {"mask_token": "mask"}  # key of Hugging Face -> name of an id that objectives add
    if model is not None and model.architecture != "decoder":
        roles["bos_token"] = "start"
    settings |= {
        role: special_names[vocabulary.special_id(name)]
        for role, name in roles.items()
        if vocabulary.special_id(name) in special_names
    }
    if model is not None and model.max_seq_len:
        settings["model_max_length"] = model.max_seq_len
    return settings


def _write_tokenizer_files(directory: Path, tokenizer_json: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    for file, value in ((TOKENIZER_FILE, tokenizer_json), (SETTINGS_FILE, settings)):
        (directory / file).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def import_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder. If `export_tokenizer` wrote it, return the original tokenizer.

    Raises CheckpointError if files are missing or malformed, or no token ends a document.
    """
    try:
        return read_hf_folder(directory)
    except DataError as error:
        raise CheckpointError(f"{error} {NO_TOKENIZER_HINT}") from None


def export_original_files(tokenizer: Tokenizer, directory: Path) -> list[str]:
    """Write the original files of an imported tokenizer, byte for byte. Return their names."""
    files = tokenizer.get_original_files()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return sorted(files)


def export_char_tokenizer(tokenizer: CharTokenizer, directory: Path) -> None:
    """Write `tokenizer.json` with one id per character. Hugging Face's tokenizer drops characters without an id."""
    bpe_model = {"type": "BPE", "vocab": dict(tokenizer.ids), "merges": []}
    tokenizer_json = {"version": "1.0", "added_tokens": [], "decoder": {"type": "Fuse"}, "model": bpe_model}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_tokenizer_files(directory, tokenizer_json, settings)
    rust_tokenizer, text = RustTokenizer.from_file(str(directory / TOKENIZER_FILE)), "".join(tokenizer.ids)
    if (
        rust_tokenizer.encode(text).ids != tokenizer.encode(text).tolist()
        or rust_tokenizer.decode([*tokenizer.encode(text)]) != text
    ):
        raise CheckpointError(f"{directory}: the written tokenizer differs from the tokenizer of characters.")


def _build_tokenizer_json(tokenizer: BPETokenizer, special_ids: Mapping[str, int], mask: str | None) -> dict[str, Any]:
    """Return the content of `tokenizer.json`. `mask` is the name of the mask token, if there is one.

    The vocabulary also contains the special tokens, because Hugging Face requires that the ids of added tokens continue
    those of the vocabulary without a gap.
    """
    vocab = {to_printable(token_bytes): merge_rank for token_bytes, merge_rank in tokenizer.ranks.items()}
    merges = list(iter_merges(tokenizer.ranks))
    if duplicates := vocab.keys() & special_ids.keys():
        raise CheckpointError(
            f"tokenizer {tokenizer.name}: {min(duplicates)!r} is a special token and an ordinary one."
        )
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(special_ids.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": token_id, "content": name, "lstrip": name == mask, **flags} for name, token_id in by_id
        ],
        "pre_tokenizer": build_pre_tokenizer(tokenizer.pattern),
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {**vocab, **special_ids}, "merges": merges},
    }


def _verify_written(tokenizer: BPETokenizer, special_ids: Mapping[str, int], directory: Path) -> None:
    """Raise CheckpointError unless the files, read back, encode and decode each byte and special token alike."""
    tokenizer_json = json.loads((directory / TOKENIZER_FILE).read_bytes())
    settings = json.loads((directory / SETTINGS_FILE).read_bytes())[EXPORT_KEY]
    try:
        reopened = convert_bpe(tokenizer_json, ENDOFTEXT, settings, tokenizer.name)
        check_same_ids(reopened, tokenizer_json)
    except Exception as error:  # `tokenizers` raises plain exceptions
        raise CheckpointError(f"{directory}: {error}") from None
    if reopened.sha256 != tokenizer.sha256:
        raise CheckpointError(f"{directory}: the written tokenizer differs from tokenizer {tokenizer.name}.")
    rust_tokenizer = RustTokenizer.from_file(str(directory / TOKENIZER_FILE))
    byte_ids = [tokenizer.ranks[bytes([byte])] for byte in range(256)]
    for ids, text in (
        (byte_ids, tokenizer.decode(byte_ids)),
        *(([token_id], name) for name, token_id in special_ids.items()),
    ):
        if rust_tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise CheckpointError(f"{directory}: {text!r} cannot be expressed in Hugging Face's files.")
