"""Read a tokenizer from a Hugging Face folder, as `from_pretrained` does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_llm.errors import CheckpointError, DataError
from dist_llm.text.hf_bpe import EXPORT_KEY, convert_bpe, prove_equal
from dist_llm.text.hf_tokenizer import (
    MERGES_FILE,
    VOCAB_FILE,
    HFTokenizer,
    build_reference,
    compute_bpe_identity,
    load_tokenizer_json,
)
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer

SETTINGS_FILE, SPECIALS_FILE, GENERATION_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)
ORIGINAL_FILES = (
    *(TOKENIZER_FILE, SETTINGS_FILE, SPECIALS_FILE, "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *(GENERATION_FILE, VOCAB_FILE, MERGES_FILE, "vocab.txt", "tokenizer.model", "spiece.model"),
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
DOCUMENT_ENDS = (ENDOFTEXT, "<|end_of_text|>")  # preferred to the eos, which in chat models ends a turn
MAX_BYTES = 1 << 30


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder has Hugging Face's tokenizer files and none of ours."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, SETTINGS_FILE, "tokenizer.model", "vocab.txt"))


def read_hf_folder(folder: Path) -> Tokenizer:
    """Read the tokenizer of a folder: as our byte-level BPE if we exported it, else unchanged as Hugging Face's.

    Raises DataError if files are missing or malformed, or no token ends a document.
    """
    files = {name: _read_file(folder / name) for name in ORIGINAL_FILES if (folder / name).is_file()}
    if TOKENIZER_FILE not in files and not {VOCAB_FILE, MERGES_FILE} <= files.keys():
        raise DataError(
            f"{folder}: no {TOKENIZER_FILE}, nor vocab.json and merges.txt. If there is another form "
            "(tokenizer.model, vocab.txt), make it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    try:
        content, settings = load_tokenizer_json(files), _parse_settings(files)
        model_config = _parse_json(_read_file(folder / "config.json")) if (folder / "config.json").is_file() else {}
        exported = settings.get(EXPORT_KEY)
        if (
            isinstance(exported, dict)
            and (tokenizer := _read_own_export(content, settings, exported, files)) is not None
        ):
            return tokenizer
        return _build_hf_tokenizer(files, content, settings, model_config)
    except (DataError, CheckpointError) as error:
        raise DataError(f"{folder}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder}: its tokenizer cannot be read: {error!r}.") from None


def _build_hf_tokenizer(
    files: dict[str, bytes], content: dict[str, Any], settings: Mapping[str, Any], model_config: Mapping[str, Any]
) -> HFTokenizer:
    reference = build_reference(files)
    vocab = reference.get_vocab(with_added_tokens=True)
    end = _find_end_token(settings, vocab)
    first_ids = _find_first_ids(reference)
    return HFTokenizer(
        files,
        max(vocab.values()) + 1,
        vocab[end],
        first_ids,
        _find_token_ids(settings, vocab, model_config),
        compute_bpe_identity(content, vocab[end], first_ids),
    )


def _read_own_export(
    content: dict[str, Any], settings: Mapping[str, Any], exported: Mapping[str, Any], files: Mapping[str, bytes]
) -> Tokenizer | None:
    """Return the tokenizer that we exported; None if another program changed it beyond our format."""
    ordinary = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    templates = "chat_template" in settings or any(name.startswith("chat_template") for name in files)
    if ordinary or templates or content.get("normalizer") is not None or _find_first_ids(build_reference(files)):
        return None
    try:
        tokenizer = convert_bpe(content, ENDOFTEXT, exported, "huggingface")
        prove_equal(tokenizer, content)
    except (CheckpointError, DataError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return tokenizer


def _find_first_ids(reference: Any) -> tuple[int, ...]:
    """Return the ids that the tokenizer adds before a text."""
    text = "a"
    alone = reference.encode(text, add_special_tokens=False).ids
    ids = reference.encode(text).ids
    for index in range(len(ids) - len(alone) + 1):
        if ids[index : index + len(alone)] == alone:
            return tuple(ids[:index])
    raise DataError(f"{text!r} has the ids {ids} with special tokens and {alone} without: not the same with added ids.")


def _find_end_token(settings: Mapping[str, Any], vocab: Mapping[str, int]) -> str:
    """Return the token that ends a document. Raises DataError if there is none."""
    ends = [*DOCUMENT_ENDS, settings.get("eos_token"), "</s>", settings.get("sep_token")]
    ends = [end for end in ends if end]
    if not (known := [end for end in ends if end in vocab]):
        raise DataError(f"no token that ends a document: none of {ends} is in the vocabulary. Set eos_token.")
    return str(known[0])


def _find_token_ids(
    settings: Mapping[str, Any], vocab: Mapping[str, int], model_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the special ids of the config.json beside the tokenizer; without one, of the tokenizer's settings."""
    if model_config:
        return {name: model_config[name] for name in TOKEN_IDS if name in model_config}
    roles = {name: str(settings.get(name.removesuffix("_id"))) for name in TOKEN_IDS}
    return {name: vocab[token] for name, token in roles.items() if token in vocab}


def _parse_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Merge special_tokens_map.json with tokenizer_config.json, which has precedence; tokens become strings."""
    merged: dict[str, Any] = {}
    for name in (SPECIALS_FILE, SETTINGS_FILE):
        merged |= {key: value for key, value in _parse_json(files.get(name, b"{}")).items() if value is not None}
    return {
        key: value["content"] if key.endswith("_token") and isinstance(value, dict) else value
        for key, value in merged.items()
    }


def _parse_json(content: bytes) -> dict[str, Any]:
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    return fields


def _read_file(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: more than {MAX_BYTES} bytes, which is too large for a tokenizer file.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path given to --tokenizer.") from None
