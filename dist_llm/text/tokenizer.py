"""The interface of all tokenizers, from text to ids and back, and the file that stores a tokenizer.

A corpus and a checkpoint have one file, `tokenizer.json`. Its bytes depend only on its content, so its hash identifies
the tokenizer. There are three kinds:

byte-level BPE  dist_llm/text/bpe_tokenizer.py: trained here, or from vocabularies in tiktoken's format
hugging face    dist_llm/text/hf_tokenizer.py: any tokenizer of the `tokenizers` library, with its original files
characters      dist_llm/text/char_tokenizer.py: one id per character, as in nanoGPT's meta.pkl
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_llm.errors import DataError
from dist_llm.io.atomic import write_durably
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary

TOKENIZER_FILE = "tokenizer.json"
BPE_FORMAT = "dist_llm tokenizer 1"
FORMAT = "dist_llm tokenizer 2"  # format of all other kinds of tokenizers; the key "kind" names the kind
ENDOFTEXT = "<|endoftext|>"
MAX_IDS = 1 << 24  # limits the memory of tables with one row per id

Ids = Sequence[int] | npt.NDArray[np.integer]


class IncrementalDecoder(Protocol):
    """Decodes ids one at a time, for streamed output. The bytes of an incomplete character are buffered."""

    def add(self, token: int) -> str:
        """Add an id. Return the text that this id completes, which may be empty."""
        ...

    def end(self) -> str:
        """Return the buffered bytes as text, with invalid bytes as U+FFFD. Further ids may follow."""
        ...


class Tokenizer(ABC):
    """Encodes text to ids, and decodes ids to text. Methods raise DataError if the tokenizer file is malformed."""

    name: str

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The largest id plus one, including special tokens. Some ids below it may be unused."""

    @property
    @abstractmethod
    def eot(self) -> int | None:
        """The end-of-document id. None: no id ends documents; only the document offsets of a corpus separate them."""

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids that begin each document and each prompt, such as BOS."""
        return ()

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Encode text, without `prefix_ids`. The string of a special token is encoded as ordinary text.

        A lone surrogate becomes U+FFFD. Raises DataError for a character without an id.
        """

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a prompt for generation: `prefix_ids`, then the ids of the text."""
        return [*self.prefix_ids, *self.encode(text).tolist()]

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """Decode `ids`; bytes that are not UTF-8, and unknown ids, become U+FFFD."""

    @abstractmethod
    def build_incremental_decoder(self, before: Ids) -> IncrementalDecoder:
        """Return a decoder for the ids that follow the ids `before`."""

    @abstractmethod
    def get_token_bytes(self) -> Mapping[int, bytes]:
        """Return {id: the bytes of its text}, without special tokens."""

    @abstractmethod
    def to_json_bytes(self) -> bytes:
        """Return the content of `tokenizer.json`."""

    def get_original_files(self) -> dict[str, bytes]:
        """Return {name: content} of the original files of a Hugging Face tokenizer, for exports; else {}."""
        return {}

    def speed_up(self) -> "Tokenizer":
        """Return a tokenizer with the same ids that encodes a large corpus faster."""
        return self

    def build_objective_vocabulary(self, with_word_edges: bool = False) -> ObjectiveVocabulary:
        """Return the vocabulary that a training objective needs.

        `with_word_edges` adds a table of the ids whose text begins or ends inside a word.
        """
        word_edges_V2 = None
        if with_word_edges:
            word_edges_V2 = np.zeros((self.vocab_size, 2), dtype=np.bool_)
            for token, text in self.get_token_bytes().items():
                if text:
                    word_edges_V2[token] = _is_word_byte(text[0]), _is_word_byte(text[-1])
        return ObjectiveVocabulary(self.vocab_size, self._padding_id if self.eot is None else self.eot, word_edges_V2)

    @property
    def _padding_id(self) -> int:
        """The id that pads examples if the tokenizer has no end-of-document id."""
        return 0

    @cached_property
    def sha256(self) -> str:
        """The hash of the file that `save` writes."""
        return sha256(self.to_json_bytes()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` into `directory` and sync it to the disk."""
        write_durably(directory / TOKENIZER_FILE, self.to_json_bytes())

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Read the tokenizer that this or an earlier version saved. Raises DataError if it is missing or malformed."""
        path = directory / TOKENIZER_FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: missing. A prepared corpus has one; make it with: dist-llm prepare") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}. Prepare the corpus again.") from None
        return parse_tokenizer(content, str(path))


def parse_tokenizer(content: bytes, location: str) -> Tokenizer:
    """Parse the bytes of our `tokenizer.json`. The message of a DataError starts with `location`."""
    from dist_llm.text.bpe_tokenizer import BPETokenizer
    from dist_llm.text.char_tokenizer import CharTokenizer
    from dist_llm.text.hf_tokenizer import HFTokenizer

    readers = {
        (BPE_FORMAT, None): BPETokenizer.from_fields,
        (FORMAT, "huggingface"): HFTokenizer.from_fields,
        (FORMAT, "characters"): CharTokenizer.from_fields,
    }
    try:
        fields = json.loads(content)
        if not is_own_format(fields):
            hint = "Prepare the corpus again with this version."
            raise DataError(f"{location}: not of format '{BPE_FORMAT}' or '{FORMAT}'. {hint}")
        if (reader := readers.get((fields["format"], fields.get("kind")))) is None:
            raise DataError(f"{location}: kind {fields.get('kind')!r} of tokenizer is unknown to this version.")
        return reader(fields)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{location}: cannot be read: {error!r}. Prepare the corpus again.") from None


def is_own_format(fields: Any) -> bool:
    """Return whether a `tokenizer.json` has our format. The `tokenizers` library writes files of the same name."""
    return isinstance(fields, dict) and fields.get("format") in (BPE_FORMAT, FORMAT)


def to_well_formed(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates replaced, so that UTF-8 can encode it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_word_byte(byte: int) -> bool:
    """Return whether a byte is part of a word: a letter, a digit, or part of a character beyond ASCII."""
    return byte >= 0x80 or chr(byte).isalnum()
