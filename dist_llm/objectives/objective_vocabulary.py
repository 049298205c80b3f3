"""The token ids of an objective: the tokenizer's, and the special tokens and sentinels after them."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_llm.config.lengths import SPECIALS


@dataclass(frozen=True)
class Vocabulary:
    """`size` ids of a tokenizer, of which `eot` ends a document; then the SPECIALS; then sentinels."""

    size: int
    eot: int
    # id begins inside a word; id ends inside a word
    word_V2: npt.NDArray[np.bool_] | None = field(default=None, compare=False)

    def special(self, name: str) -> int:
        """Return the id of one of SPECIALS."""
        return self.size + SPECIALS.index(name)

    def sentinel(self, number: int) -> int:
        """Return the id of the sentinel of span `number`, from 0."""
        return self.size + len(SPECIALS) + number

    def describe(self, token: int) -> str | None:
        """Return the name of an added id, such as `<mask>`; None for an id of the tokenizer."""
        extra = token - self.size
        if extra < 0:
            return None
        return f"<{SPECIALS[extra]}>" if extra < len(SPECIALS) else f"<sentinel {extra - len(SPECIALS)}>"
