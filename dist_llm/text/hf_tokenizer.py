"""A tokenizer of the `tokenizers` library, run unchanged, with its original files.

Our file contains the original files byte for byte, and three values that are derived from them once: the id that ends a
document, the ids before a document, and the identity of a byte-level BPE of ours with equal ids, if there is one.
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

from dist_llm.data.tokenizer_file import BPE_IDENTITY, bpe_identity
from dist_llm.errors import CheckpointError, DataError
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.byte_alphabet import CHAR_TO_BYTE, to_bytes
from dist_llm.text.hf_bpe import convert_bpe, prove_equal
from dist_llm.text.tokenizer import FORMAT, TOKENIZER_FILE, Tokenizer, to_well_formed

VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
STREAM_CONTEXT = 8  # ids before a stream that may affect the decoding of its first ids
MAX_WAITING = 8  # maximum number of ids that together make one character
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class HFTokenizer(Tokenizer):
    """`files`: the original files by name. `token_ids`: bos_token_id and similar ids of the original model.

    `equal_bpe` is the identity of the byte-level BPE that yields the same ids for every text; empty if there is none.
    """

    files: dict[str, bytes]
    num_ids: int
    end_token: int
    first_tokens: tuple[int, ...] = ()
    token_ids: dict[str, Any] = field(default_factory=dict)
    equal_bpe: str = ""
    fast: bool = field(default=False, compare=False)  # encode by tiktoken if it is proven equal
    name: str = "huggingface"

    def __post_init__(self) -> None:
        if not 0 < self.num_ids <= 1 << 32 or not all(
            0 <= token < self.num_ids for token in (self.end_token, *self.first_tokens)
        ):
            raise DataError(
                f"tokenizer of Hugging Face: {self.num_ids} ids, of which {self.end_token} ends a document."
            )

    @property
    def vocab_size(self) -> int:
        return self.num_ids

    @property
    def eot(self) -> int:
        return self.end_token

    @property
    def first_ids(self) -> tuple[int, ...]:
        return self.first_tokens

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        text = to_well_formed(text)
        if self._bpe is not None and (not self._normalizes or unicodedata.is_normalized("NFC", text)):
            return self._bpe.encode(text)
        return np.array(self.as_text.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a prompt in which the string of a special token becomes that token, as chat templates need."""
        reference = self._reference()
        return [*self.first_ids, *reference.encode(to_well_formed(text), add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        segments: list[str] = []
        run: list[int] = []
        for token in np.asarray(ids, dtype=np.int64).tolist():
            if 0 <= token < self.vocab_size and self.as_text.id_to_token(token) is not None:
                run.append(token)
            else:
                segments += [self._decode(run), REPLACEMENT]
                run = []
        return "".join([*segments, self._decode(run)])

    def text_stream(self, before: Sequence[int] | npt.NDArray[np.integer]) -> "HFTextStream":
        return HFTextStream(self, [token for token in list(before)[-STREAM_CONTEXT:] if token < self.vocab_size])

    def token_bytes(self) -> Mapping[int, bytes]:
        content = self.content
        special = {token["id"] for token in content.get("added_tokens") or [] if token.get("special")}
        to_text = _build_token_decoder(content)
        vocab = self.as_text.get_vocab(with_added_tokens=True)
        added = {token["id"] for token in content.get("added_tokens") or []}
        return {
            number: token.encode() if number in added else to_text(token)
            for token, number in vocab.items()
            if number not in special
        }

    def original_files(self) -> dict[str, bytes]:
        return dict(self.files)

    def speed_up(self) -> "HFTokenizer":
        """Return a tokenizer that encodes by tiktoken if tiktoken is proven, at first use, to yield the same ids."""
        return replace(self, fast=True)

    def file_bytes(self) -> bytes:
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
            BPE_IDENTITY: self.equal_bpe,
            "files": texts,
            "binary_files": binary_files,
        }
        return (json.dumps(fields, ensure_ascii=False, indent=1) + "\n").encode()

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "HFTokenizer":
        """Build the tokenizer from the JSON fields of `file_bytes`. Raises the exception of a malformed field."""
        files = {name: text.encode() for name, text in fields["files"].items()}
        files |= {name: base64.b64decode(text, validate=True) for name, text in fields["binary_files"].items()}
        if wrong := [name for name in files if "/" in name or name in ("", ".", "..")]:
            raise ValueError(f"a file outside its folder: {wrong[0]!r}")
        return HFTokenizer(
            files,
            index(fields["vocab_size"]),  # rejects strings and fractions
            index(fields["end_token"]),
            tuple(map(index, fields["first_tokens"])),
            dict(fields["token_ids"]),
            str(fields[BPE_IDENTITY]),
        )

    @cached_property
    def content(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json`. Raises DataError."""
        return load_tokenizer_json(self.files)

    @cached_property
    def as_text(self) -> Any:
        """Return the library's tokenizer, which encodes the strings of special tokens as text."""
        reference = self._reference()
        reference.encode_special_tokens = True
        return reference

    @cached_property
    def _bpe(self) -> BPETokenizer | None:
        return try_convert_to_bpe(self.content, self.end_token) if self.fast else None

    @cached_property
    def _normalizes(self) -> bool:
        return self.content.get("normalizer") is not None

    def _reference(self) -> Any:
        return build_reference(self.files)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.as_text.decode(ids, skip_special_tokens=False) if ids else ""
        return text


class HFTextStream:
    """A `TextStream` that decodes a window of ids again for each new id, and returns the new text.

    The text of an id may depend on its neighbours: a leading blank is dropped, or several ids make one character.
    """

    def __init__(self, tokenizer: HFTokenizer, before: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, before
        self._begin, self._end = 0, len(before)  # range of ids whose text was returned but which are still needed

    def add(self, token: int) -> str:
        self._ids.append(token)
        old_text, new_text = (
            self._tokenizer.decode(self._ids[self._begin : end]) for end in (self._end, len(self._ids))
        )
        waiting = len(self._ids) - self._end
        if len(new_text) <= len(old_text) or (new_text.endswith(REPLACEMENT) and waiting < MAX_WAITING):
            return ""
        return self._advance(old_text, new_text)

    def end(self) -> str:
        old_text, new_text = (
            self._tokenizer.decode(self._ids[self._begin : end]) for end in (self._end, len(self._ids))
        )
        return self._advance(old_text, new_text)

    def _advance(self, old_text: str, new_text: str) -> str:
        self._begin, self._end = self._end, len(self._ids)
        return new_text[len(old_text) :]


def load_tokenizer_json(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the JSON of `tokenizer.json`, or an equal one built from GPT-2's two files. Raises DataError."""
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
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": lines}
    return {"version": "1.0", "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def build_reference(files: Mapping[str, bytes]) -> Any:
    """Build the library's tokenizer, without the length limit that its file may set. Raises DataError."""
    from tokenizers import Tokenizer as Reference

    try:
        if TOKENIZER_FILE in files:
            reference = Reference.from_str(files[TOKENIZER_FILE].decode())
        else:
            reference = Reference.from_str(json.dumps(load_tokenizer_json(files)))
        reference.no_truncation()  # otherwise documents would be truncated without a message
        reference.no_padding()
    except (KeyboardInterrupt, SystemExit, DataError):
        raise
    except BaseException as error:  # the library raises plain exceptions, and a Rust panic is not an Exception
        raise DataError(f"{TOKENIZER_FILE} cannot be read by the tokenizers library: {error}.") from None
    return reference


def can_be_bpe(content: Mapping[str, Any]) -> bool:
    """Return whether `convert_to_bpe` supports it: all added tokens are special, and the normalizer is at most NFC."""
    ordinary = [token for token in content.get("added_tokens") or [] if not token.get("special")]
    normalizer = content.get("normalizer")
    return not ordinary and (normalizer is None or normalizer == {"type": "NFC"})


def convert_to_bpe(content: Mapping[str, Any], eot: int) -> BPETokenizer:
    """Return the byte-level BPE with equal ids, proven on difficult texts. Raises CheckpointError or DataError."""
    names = {number: token for token, number in content["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    bpe = convert_bpe(content, names[eot], {}, "huggingface")
    prove_equal(bpe, content)
    return bpe


def try_convert_to_bpe(content: Mapping[str, Any], eot: int) -> BPETokenizer | None:
    """Convert as `convert_to_bpe` does; return None if that raises."""
    if not can_be_bpe(content):
        return None
    try:
        return convert_to_bpe(content, eot)
    except (CheckpointError, DataError, KeyError, TypeError, ValueError, AttributeError):
        return None


def compute_bpe_identity(content: Mapping[str, Any], eot: int, first_ids: Sequence[int]) -> str:
    """Return the identity of our byte-level BPE that yields the same corpus; empty if there is none."""
    bpe = None if content.get("normalizer") is not None or first_ids else try_convert_to_bpe(content, eot)
    return bpe_identity(json.loads(bpe.file_bytes())) if bpe is not None else ""


def _build_token_decoder(content: Mapping[str, Any]) -> Any:
    """Return a function from a token of the vocabulary to the bytes of its text, including a leading blank."""
    steps = json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    model = content["model"]
    if '"ByteLevel"' in steps:
        return lambda token: to_bytes(token) if CHAR_TO_BYTE.keys() >= set(token) else token.encode()
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        return lambda token: token.removeprefix(prefix).encode() if token.startswith(prefix) else f" {token}".encode()
    return _decode_sentencepiece if model.get("byte_fallback") else lambda token: token.replace("▁", " ").encode()


def _decode_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()
