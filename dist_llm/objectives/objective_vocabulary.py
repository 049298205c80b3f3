"""The token ids of an objective: the tokenizer's, and the special tokens and sentinels after them."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_llm.config.lengths import SPECIALS


@dataclass(frozen=True)
class Vocabulary:
    """The ids 0 to `num_tokenizer_ids` - 1 of a tokenizer, then those of SPECIALS, then the sentinels.

    `eot` is the end-of-document token. It is one of the tokenizer's ids.
    """

    num_tokenizer_ids: int
    eot: int
    # One row per id. Column 0: the token begins inside a word. Column 1: it ends inside a word.
    word_V2: npt.NDArray[np.bool_] | None = field(default=None, compare=False)

    def special_id(self, name: str) -> int:
        """The id of one of SPECIALS."""
        return self.num_tokenizer_ids + SPECIALS.index(name)

    def sentinel(self, number: int) -> int:
        """The id of the sentinel of span `number`, from 0."""
        return self.num_tokenizer_ids + len(SPECIALS) + number

    def describe(self, token: int) -> str | None:
        """The name of an added id, such as `<mask>`; None for an id of the tokenizer."""
        extra = token - self.num_tokenizer_ids
        if extra < 0:
            return None
        return f"<{SPECIALS[extra]}>" if extra < len(SPECIALS) else f"<sentinel {extra - len(SPECIALS)}>"
