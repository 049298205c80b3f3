"""Text to token ids and back: byte-level BPE run by tiktoken, kept in one file of its own.

A tokenizer is four things: a name, a pattern that splits text into pieces, a rank (= id) for each
mergeable byte string, and ids for special strings. `tokenizer.json` holds exactly these, in a form
whose bytes are a function of the content, so a hash of the file identifies the tokenizer.
"""

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dist_llm.errors import DataError
from dist_llm.objectives.vocabulary import Vocabulary

if TYPE_CHECKING:
    import tiktoken

TOKENIZER_FILE = "tokenizer.json"
FORMAT = "dist_llm tokenizer 1"
ENDOFTEXT = "<|endoftext|>"
MAX_IDS = 1 << 24  # tables have a row for each

# As published with each model. cl100k's possessive quantifiers change speed, not meaning.
SPLIT_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}

# tiktoken's regex engine gives up on about a million blanks in a row; text it refuses is cut this small.
PIECE_CHARS = 100_000


def _in_word(byte: int) -> bool:
    """Whether a byte is part of a word: a letter, a digit, or of a character beyond ASCII."""
    return byte >= 0x80 or chr(byte).isalnum()


def well_formed(text: str) -> str:
    """`text`, its surrogate pairs joined and lone surrogates replaced, so that it has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@dataclass(frozen=True)
class Tokenizer:
    """Byte-level BPE. `ranks` maps each mergeable byte string to its id, which is also its merge priority.

    Raises DataError where the parts cannot make a tokenizer.
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
        """The largest id plus one, specials included (there may be unused ids below it)."""
        return max(max(self.ranks.values()), max(self.special_tokens.values())) + 1

    @property
    def eot(self) -> int:
        """The id of `<|endoftext|>`."""
        return self.special_tokens[ENDOFTEXT]

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of any text. A special token's string is ordinary text here; lone surrogates become U+FFFD."""
        try:
            return self._encode(text)
        except UnicodeEncodeError:
            return self.encode(well_formed(text))
        except ValueError:  # the regex engine ran out of stack
            pieces = [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
            return np.concatenate([self._encode(piece) for piece in pieces])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes of `ids`. An id without a token, which a model may still sample, becomes U+FFFD."""
        known: list[int] = np.asarray(ids, dtype=np.int64).tolist()
        try:
            return self._encoding.decode_bytes(known)
        except (KeyError, OverflowError):
            return b"".join(self._bytes_of.get(each, b"\xef\xbf\xbd") for each in known)

    def vocabulary(self, words: bool = False) -> Vocabulary:
        """What an objective knows of these ids; with `words` also which begin and end inside a word."""
        word_V2 = None
        if words:
            word_V2 = np.zeros((self.vocab_size, 2), dtype=np.bool_)
            for token, rank in self.ranks.items():
                word_V2[rank] = _in_word(token[0]), _in_word(token[-1])
        return Vocabulary(self.vocab_size, self.eot, word_V2)

    @cached_property
    def sha256(self) -> str:
        """The hash of the file that `save` writes."""
        return hashlib.sha256(self.file_bytes()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` into `directory`, durably."""
        with (directory / TOKENIZER_FILE).open("wb") as file:
            file.write(self.file_bytes())
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises DataError where it is missing or malformed."""
        path = directory / TOKENIZER_FILE
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise DataError(f"{path}: not of format '{FORMAT}'. Prepare the corpus again with this version.")
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in content["ranks"].items()}
            if not isinstance(content["name"], str) or not isinstance(content["pattern"], str):
                raise ValueError("name and pattern must be texts")
            specials = {str(token): int(rank) for token, rank in content["special_tokens"].items()}
            return Tokenizer(content["name"], content["pattern"], ranks, specials)
        except FileNotFoundError:
            raise DataError(f"{path}: missing. A prepared corpus has one; make it with: dist-llm prepare") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read: {error!r}. Prepare the corpus again.") from None

    def _encode(self, text: str) -> npt.NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        special = {rank: token.encode() for token, rank in self.special_tokens.items()}
        return {rank: token for token, rank in self.ranks.items()} | special

    def file_bytes(self) -> bytes:
        """What `save` writes."""
        content = {
            "format": FORMAT,
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": dict(sorted(self.special_tokens.items(), key=lambda item: item[1])),
            "ranks": {
                base64.b64encode(token).decode(): rank
                for token, rank in sorted(self.ranks.items(), key=lambda item: item[1])
            },
        }
        return (json.dumps(content, indent=1) + "\n").encode()
