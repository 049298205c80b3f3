"""Read a tokenizer from a Hugging Face folder, as `from_pretrained` does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_llm.errors import CheckpointError, DataError
from dist_llm.text.hf_bpe import EXPORT_KEY, check_same_ids, convert_bpe
from dist_llm.text.hf_tokenizer import (
    MERGES_FILE,
    VOCAB_FILE,
    HFTokenizer,
    build_backend,
    compute_bpe_identity,
    load_tokenizer_json,
)
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer

SETTINGS_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
ORIGINAL_FILES = (
    *(TOKENIZER_FILE, SETTINGS_FILE, SPECIALS_FILE, "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    *(GENERATION_FILE, VOCAB_FILE, MERGES_FILE, "vocab.txt", "tokenizer.model", "spiece.model"),
)
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
DOCUMENT_END_TOKENS = (ENDOFTEXT, "<|end_of_text|>")  # preferred to eos_token, which ends a turn in chat models
MAX_FILE_BYTES = 1 << 30


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder has tokenizer files under the names that Hugging Face uses."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, SETTINGS_FILE, "tokenizer.model", "vocab.txt"))


def read_hf_folder(folder: Path) -> Tokenizer:
    """Read the tokenizer of a folder: a BPETokenizer if dist_llm exported it, else an HFTokenizer.

    Raises DataError if files are missing or malformed, or no token ends a document.
    """
    files = {name: _read_file(folder / name) for name in ORIGINAL_FILES if (folder / name).is_file()}
    if TOKENIZER_FILE not in files and not {VOCAB_FILE, MERGES_FILE} <= files.keys():
        raise DataError(
            f"{folder}: has neither {TOKENIZER_FILE} nor vocab.json and merges.txt. If it has tokenizer.model or "
            f"vocab.txt, make {TOKENIZER_FILE} with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    try:
        content, settings = load_tokenizer_json(files), _parse_settings(files)
        model_config = _parse_json(_read_file(folder / "config.json")) if (folder / "config.json").is_file() else {}
        exported = settings.get(EXPORT_KEY)
        tokenizer = _read_own_export(content, settings, exported, files) if isinstance(exported, dict) else None
        return tokenizer or _build_hf_tokenizer(files, content, settings, model_config)
    except (DataError, CheckpointError) as error:
        raise DataError(f"{folder}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder}: its tokenizer cannot be read: {error!r}.") from None


def _build_hf_tokenizer(
    files: dict[str, bytes], content: dict[str, Any], settings: Mapping[str, Any], model_config: Mapping[str, Any]
) -> HFTokenizer:
    backend = build_backend(files)
    vocab = backend.get_vocab(with_added_tokens=True)
    end_id = vocab[_find_end_token(settings, vocab)]
    prefix_ids = _find_prefix_ids(backend)
    return HFTokenizer(
        files=files,
        num_ids=max(vocab.values()) + 1,
        end_token=end_id,
        first_tokens=prefix_ids,
        token_ids=_find_token_ids(settings, vocab, model_config),
        equal_bpe=compute_bpe_identity(content, end_id, prefix_ids),
    )


def _read_own_export(
    content: dict[str, Any], settings: Mapping[str, Any], exported: Mapping[str, Any], files: Mapping[str, bytes]
) -> Tokenizer | None:
    """Return the tokenizer that we exported, or None if another program added something that BPETokenizer lacks."""
    has_ordinary_added_token = any(not token.get("special") for token in content.get("added_tokens") or [])
    has_chat_template = "chat_template" in settings or any(name.startswith("chat_template") for name in files)
    if has_ordinary_added_token or has_chat_template or content.get("normalizer") is not None:
        return None
    if _find_prefix_ids(build_backend(files)):
        return None
    try:
        tokenizer = convert_bpe(content, ENDOFTEXT, exported, "huggingface")
        check_same_ids(tokenizer, content)
    except (CheckpointError, DataError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return tokenizer


def _find_prefix_ids(backend: Any) -> tuple[int, ...]:
    """Return the ids that the tokenizer adds before a text."""
    text = "a"
    text_ids = backend.encode(text, add_special_tokens=False).ids
    ids = backend.encode(text).ids
    for index in range(len(ids) - len(text_ids) + 1):
        if ids[index : index + len(text_ids)] == text_ids:
            return tuple(ids[:index])
    raise DataError(
        f"{text!r} has the ids {ids} with special tokens and {text_ids} without; the first must contain the second."
    )


def _find_end_token(settings: Mapping[str, Any], vocab: Mapping[str, int]) -> str:
    """Return the token that ends a document. Raises DataError if there is none."""
    candidates = [*DOCUMENT_END_TOKENS, settings.get("eos_token"), "</s>", settings.get("sep_token")]
    candidates = [token for token in candidates if token]
    for token in candidates:
        if token in vocab:
            return str(token)
    raise DataError(f"no token that ends a document: none of {candidates} is in the vocabulary. Set eos_token.")


def _find_token_ids(
    settings: Mapping[str, Any], vocab: Mapping[str, int], model_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return {key of TOKEN_ID_KEYS: id} from the config.json of the model or, without one, from tokenizer_config."""
    if model_config:
        return {key: model_config[key] for key in TOKEN_ID_KEYS if key in model_config}
    token_of_key = {key: str(settings.get(key.removesuffix("_id"))) for key in TOKEN_ID_KEYS}
    return {key: vocab[token] for key, token in token_of_key.items() if token in vocab}


def _parse_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Merge special_tokens_map.json and tokenizer_config.json, which has precedence. Tokens become strings."""
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
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: more than {MAX_FILE_BYTES} bytes, which is too large for a tokenizer file.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path given to --tokenizer.") from None
