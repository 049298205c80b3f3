"""Token ids as an objective sees them: the tokenizer's own, and after them those that it adds."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_llm.config.lengths import SPECIALS


@dataclass(frozen=True)
class Vocabulary:
    """`size` ids of a tokenizer, of which `eot` ends a document; then those in SPECIALS; then sentinels."""

    size: int
    eot: int
    word_V2: npt.NDArray[np.bool_] | None = field(default=None, compare=False)  # id begins, ends inside a word

    def special(self, name: str) -> int:
        """The id of one of SPECIALS."""
        return self.size + SPECIALS.index(name)

    def sentinel(self, number: int) -> int:
        """The id that stands for cut-out span `number`, from 0."""
        return self.size + len(SPECIALS) + number

    def describe(self, token: int) -> str | None:
        """The name of an added id, as `<mask>`; None for the tokenizer's."""
        extra = token - self.size
        if extra < 0:
            return None
        return f"<{SPECIALS[extra]}>" if extra < len(SPECIALS) else f"<sentinel {extra - len(SPECIALS)}>"
