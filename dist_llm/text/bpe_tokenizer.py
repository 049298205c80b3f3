"""A byte-level BPE tokenizer, run by tiktoken.

The tokenizer has a name, a split pattern (a regular expression that splits text before merging), a rank (= id) for
each mergeable byte string, and ids for special tokens. The name appears only in messages.
"""

import base64
import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dist_llm.errors import DataError
from dist_llm.text.tokenizer import BPE_FORMAT, ENDOFTEXT, MAX_IDS, Tokenizer, to_well_formed

if TYPE_CHECKING:
    import tiktoken

# The split pattern that was published with each model. The possessive quantifiers (`?+`) of cl100k only affect speed.
SPLIT_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}

# The regex engine of tiktoken fails on about a million consecutive blanks. Text on which it fails is encoded in
# segments of this length.
SEGMENT_CHARS = 100_000


@dataclass(frozen=True)
class BPETokenizer(Tokenizer):
    """Byte-level BPE. `ranks` maps each mergeable byte string to its id, which is also its merge priority.

    The constructor raises DataError for a byte without an id, for invalid ids, and if `<|endoftext|>` is missing.
    """

    name: str
    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]

    def __post_init__(self) -> None:
        ids = [*self.ranks.values(), *self.special_tokens.values()]
        if missing := [byte for byte in range(256) if bytes([byte]) not in self.ranks]:
            raise DataError(f"tokenizer {self.name}: no id for byte {missing[0]:#04x}; all 256 bytes need one.")
        if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= MAX_IDS:
            raise DataError(f"tokenizer {self.name}: ids must be distinct, not negative, and below {MAX_IDS}.")
        if ENDOFTEXT not in self.special_tokens:
            raise DataError(f"tokenizer {self.name}: no special token {ENDOFTEXT}, which ends each document.")

    @property
    def vocab_size(self) -> int:
        return max(max(self.ranks.values()), max(self.special_tokens.values())) + 1

    @property
    def eot(self) -> int:
        """The id of `<|endoftext|>`."""
        return self.special_tokens[ENDOFTEXT]

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self.encode(to_well_formed(text))
        except ValueError:  # the regex engine ran out of stack
            segments = [text[start : start + SEGMENT_CHARS] for start in range(0, len(text), SEGMENT_CHARS)]
            return np.concatenate([self._encode(segment) for segment in segments])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
        """Return the bytes of `ids`. An id without a token becomes U+FFFD: a model may sample unused ids."""
        token_ids: list[int] = np.asarray(ids, dtype=np.int64).tolist()
        try:
            return self._encoding.decode_bytes(token_ids)
        except (KeyError, OverflowError):
            return b"".join(self._id_to_bytes.get(token_id, b"\xef\xbf\xbd") for token_id in token_ids)

    def build_incremental_decoder(self, before: Sequence[int] | npt.NDArray[np.integer]) -> "ByteIncrementalDecoder":
        return ByteIncrementalDecoder(self)

    def get_token_bytes(self) -> Mapping[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()}

    def to_json_bytes(self) -> bytes:
        content = {
            "format": BPE_FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": dict(sorted(self.special_tokens.items(), key=lambda item: item[1])),
            "ranks": {
                base64.b64encode(token).decode(): rank
                for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
            },
        }
        return (json.dumps(content, indent=1) + "\n").encode()

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "BPETokenizer":
        """Build the tokenizer from the JSON fields of `to_json_bytes`. Raises the exception of a malformed field."""
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in fields["ranks"].items()}
        specials = {str(token): int(rank) for token, rank in fields["special_tokens"].items()}
        return BPETokenizer(str(fields["name"]), str(fields["pattern"]), ranks, specials)

    def _encode(self, text: str) -> npt.NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @cached_property
    def _id_to_bytes(self) -> dict[int, bytes]:
        special = {rank: token.encode() for token, rank in self.special_tokens.items()}
        return {rank: token for token, rank in self.ranks.items()} | special


class ByteIncrementalDecoder:
    """The `IncrementalDecoder` of a tokenizer whose ids represent bytes."""

    def __init__(self, tokenizer: BPETokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)
