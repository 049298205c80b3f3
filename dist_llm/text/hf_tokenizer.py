"""A tokenizer of Hugging Face's `tokenizers` library, run unchanged.

Our `tokenizer.json` contains the original files byte for byte, and three values that are derived from them once: the id
that ends a document, the ids before a document, and the identity of a BPETokenizer with equal ids, if there is one.
Below, `backend` is the tokenizer object of the library.
"""

import base64
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.data.tokenizer_file import EQUAL_BPE_KEY, hash_bpe_ids
from dist_llm.errors import CheckpointError, DataError
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.byte_alphabet import CHAR_TO_BYTE, to_bytes
from dist_llm.text.hf_bpe import check_same_ids, convert_bpe
from dist_llm.text.tokenizer import FORMAT, TOKENIZER_FILE, Tokenizer, to_well_formed

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
DECODER_CONTEXT_TOKENS = 8  # number of preceding ids that may affect the text of the next ids
MAX_IDS_PER_CHAR = 8  # after this many ids, a replacement character is not the beginning of another one
REPLACEMENT_CHAR = "\ufffd"


@dataclass(frozen=True)
class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer, with its original files."""

    files: dict[str, bytes]  # the original files by name
    num_ids: int
    end_token: int
    first_tokens: tuple[int, ...] = ()
    token_ids: dict[str, Any] = field(default_factory=dict)  # bos_token_id and similar ids of the original model
    equal_bpe: str = ""  # identity of the byte-level BPE that gives the same ids for all texts; empty: there is none
    fast: bool = field(default=False, compare=False)  # encode with tiktoken if `check_same_ids` passes
    name: str = "huggingface"

    def __post_init__(self) -> None:
        if not 0 < self.num_ids <= 1 << 32 or not all(
            0 <= token < self.num_ids for token in (self.end_token, *self.first_tokens)
        ):
            raise DataError(
                f"tokenizer of Hugging Face: {self.num_ids} ids, but {self.end_token} ends a document and "
                f"{list(self.first_tokens)} begin one. Ids must be from 0 to {self.num_ids - 1}."
            )

    @property
    def vocab_size(self) -> int:
        return self.num_ids

    @property
    def eot(self) -> int:
        return self.end_token

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        return self.first_tokens

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        text = to_well_formed(text)
        if self._bpe is not None and (not self._normalizes or unicodedata.is_normalized("NFC", text)):
            return self._bpe.encode(text)
        return np.array(self.text_backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a prompt in which the string of a special token becomes that token, as chat templates need."""
        backend = self._build_backend()
        return [*self.prefix_ids, *backend.encode(to_well_formed(text), add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        segments: list[str] = []
        known_ids: list[int] = []  # since the last id without a token
        for token in np.asarray(ids, dtype=np.int64).tolist():
            if 0 <= token < self.vocab_size and self.text_backend.id_to_token(token) is not None:
                known_ids.append(token)
            else:
                segments += [self._decode(known_ids), REPLACEMENT_CHAR]
                known_ids = []
        return "".join([*segments, self._decode(known_ids)])

    def build_incremental_decoder(self, before: Sequence[int] | npt.NDArray[np.integer]) -> "HFIncrementalDecoder":
        return HFIncrementalDecoder(
            self, [token for token in list(before)[-DECODER_CONTEXT_TOKENS:] if token < self.vocab_size]
        )

    def get_token_bytes(self) -> Mapping[int, bytes]:
        content = self.content
        special_ids = {token["id"] for token in content.get("added_tokens") or [] if token.get("special")}
        decode_token = _build_token_decoder(content)
        vocab = self.text_backend.get_vocab(with_added_tokens=True)
        added_ids = {token["id"] for token in content.get("added_tokens") or []}
        return {
            token_id: token.encode() if token_id in added_ids else decode_token(token)
            for token, token_id in vocab.items()
            if token_id not in special_ids
        }

    def get_original_files(self) -> dict[str, bytes]:
        return dict(self.files)

    def speed_up(self) -> "HFTokenizer":
        """Return a tokenizer that encodes with tiktoken if, at first use, `check_same_ids` finds equal ids."""
        return replace(self, fast=True)

    def to_json_bytes(self) -> bytes:
        texts: dict[str, str] = {}
        binary_files: dict[str, str] = {}
        for name, content in sorted(self.files.items()):
            try:
                texts[name] = content.decode("utf-8")
            except UnicodeDecodeError:
                binary_files[name] = base64.b64encode(content).decode()
        fields = {
            "format": FORMAT,
            "kind": "huggingface",
            "vocab_size": self.num_ids,
            "end_token": self.end_token,
            "first_tokens": list(self.first_tokens),
            "token_ids": self.token_ids,
            EQUAL_BPE_KEY: self.equal_bpe,
            "files": texts,
            "binary_files": binary_files,
        }
        return (json.dumps(fields, ensure_ascii=False, indent=1) + "\n").encode()

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "HFTokenizer":
        """Build the tokenizer from the JSON fields of `to_json_bytes`. Raises the exception of a malformed field."""
        files = {name: text.encode() for name, text in fields["files"].items()}
        files |= {name: base64.b64decode(text, validate=True) for name, text in fields["binary_files"].items()}
        if invalid_names := [name for name in files if "/" in name or name in ("", ".", "..")]:
            raise ValueError(f"a file outside its folder: {invalid_names[0]!r}")
        return HFTokenizer(
            files=files,
            num_ids=index(fields["vocab_size"]),  # `index` rejects strings and fractions
            end_token=index(fields["end_token"]),
            first_tokens=tuple(map(index, fields["first_tokens"])),
            token_ids=dict(fields["token_ids"]),
            equal_bpe=str(fields[EQUAL_BPE_KEY]),
        )

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of the original `tokenizer.json`. Raises DataError if it cannot be read."""
        return load_tokenizer_json(self.files)

    @cached_property
    def text_backend(self) -> Any:
        """The backend, set up to encode the strings of special tokens as ordinary text."""
        backend = self._build_backend()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _bpe(self) -> BPETokenizer | None:
        return try_convert_to_bpe(self.content, self.end_token) if self.fast else None

    @cached_property
    def _normalizes(self) -> bool:
        return self.content.get("normalizer") is not None

    def _build_backend(self) -> Any:
        return build_backend(self.files)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.text_backend.decode(ids, skip_special_tokens=False) if ids else ""
        return text


class HFIncrementalDecoder:
    """The `IncrementalDecoder` of an HFTokenizer: it decodes the latest ids again for each new id.

    The text of an id may depend on its neighbours: a leading blank is dropped, or several ids make one character.
    """

    def __init__(self, tokenizer: HFTokenizer, context_ids: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, context_ids
        # The text of ids [begin, end) was returned. These ids are still needed as the context of the later ids.
        self._context_begin, self._context_end = 0, len(context_ids)

    def add(self, token: int) -> str:
        self._ids.append(token)
        old_text, new_text = self._decode_with_context()
        num_pending_ids = len(self._ids) - self._context_end
        is_incomplete_char = new_text.endswith(REPLACEMENT_CHAR) and num_pending_ids < MAX_IDS_PER_CHAR
        if len(new_text) <= len(old_text) or is_incomplete_char:
            return ""
        return self._advance(old_text, new_text)

    def end(self) -> str:
        return self._advance(*self._decode_with_context())

    def _decode_with_context(self) -> tuple[str, str]:
        """Return (the text of the context ids, the text of the context ids and all later ids)."""
        old_text = self._tokenizer.decode(self._ids[self._context_begin : self._context_end])
        return old_text, self._tokenizer.decode(self._ids[self._context_begin :])

    def _advance(self, old_text: str, new_text: str) -> str:
        """Return the text after the context. The ids of this text become the context of later ids."""
        self._context_begin, self._context_end = self._context_end, len(self._ids)
        return new_text[len(old_text) :]


def load_tokenizer_json(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the content of `tokenizer.json`, or an equivalent built from vocab.json and merges.txt.

    Raises DataError if the files cannot be read.
    """
    try:
        if TOKENIZER_FILE in files:
            content = json.loads(files[TOKENIZER_FILE])
        else:
            content = _build_gpt2_json(json.loads(files[VOCAB_FILE]), files[MERGES_FILE].decode())
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise ValueError("no model in it")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{TOKENIZER_FILE} cannot be read: {error!r}.") from None
    return content


def _build_gpt2_json(vocab: dict[str, int], merges: str) -> dict[str, Any]:
    """Build the content of `tokenizer.json` from the content of vocab.json and merges.txt."""
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": lines}
    return {"version": "1.0", "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def build_backend(files: Mapping[str, bytes]) -> Any:
    """Build the tokenizer of the `tokenizers` library, without truncation and padding. Raises DataError."""
    from tokenizers import Tokenizer as LibraryTokenizer

    try:
        if TOKENIZER_FILE in files:
            backend = LibraryTokenizer.from_str(files[TOKENIZER_FILE].decode())
        else:
            backend = LibraryTokenizer.from_str(json.dumps(load_tokenizer_json(files)))
        backend.no_truncation()  # otherwise documents would be truncated without a message
        backend.no_padding()
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    except BaseException as error:  # the library raises `Exception` itself, and a Rust panic is not an Exception
        raise DataError(f"{TOKENIZER_FILE} cannot be read by the tokenizers library: {error}.") from None
    return backend


def can_be_bpe(content: Mapping[str, Any]) -> bool:
    """Return whether `convert_to_bpe` may succeed: all added tokens are special, and the normalizer is NFC or none."""
    ordinary = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    normalizer = content.get("normalizer")
    return not ordinary and (normalizer is None or normalizer == {"type": "NFC"})


def convert_to_bpe(content: Mapping[str, Any], eot: int) -> BPETokenizer:
    """Return the byte-level BPE with equal ids, checked by `check_same_ids`. Raises CheckpointError or DataError."""
    token_of_id = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    token_of_id |= {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    bpe = convert_bpe(content, token_of_id[eot], exported={}, name="huggingface")
    check_same_ids(bpe, content)
    return bpe


def try_convert_to_bpe(content: Mapping[str, Any], eot: int) -> BPETokenizer | None:
    """Convert as `convert_to_bpe` does, but return None if the conversion fails."""
    if not can_be_bpe(content):
        return None
    try:
        return convert_to_bpe(content, eot)
    except (CheckpointError, DataError, KeyError, TypeError, ValueError, AttributeError):
        return None


def compute_bpe_identity(content: Mapping[str, Any], eot: int, prefix_ids: Sequence[int]) -> str:
    """Return the identity of the BPETokenizer that yields the same corpus; empty if there is none."""
    bpe = None if content.get("normalizer") is not None or prefix_ids else try_convert_to_bpe(content, eot)
    return hash_bpe_ids(json.loads(bpe.to_json_bytes())) if bpe is not None else ""


def _build_token_decoder(content: Mapping[str, Any]) -> Any:
    """Return a function that converts a token of the vocabulary to the bytes of its text, with its leading blank."""
    steps = json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    model = content["model"]
    if '"ByteLevel"' in steps:
        return lambda token: to_bytes(token) if CHAR_TO_BYTE.keys() >= set(token) else token.encode()
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        return lambda token: token.removeprefix(prefix).encode() if token.startswith(prefix) else f" {token}".encode()
    return _decode_sentencepiece if model.get("byte_fallback") else lambda token: token.replace("▁", " ").encode()


def _decode_sentencepiece(token: str) -> bytes:
    """Return the bytes of a token of SentencePiece, in which <0x0A> is a byte and U+2581 is a blank."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()
