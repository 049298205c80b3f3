"""The token ids that a training objective uses: ids of the tokenizer, special tokens such as <mask>, and sentinels."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dist_llm.config.sequence_lengths import SPECIAL_TOKENS


@dataclass(frozen=True)
class ObjectiveVocabulary:
    """The ids 0 to `num_tokenizer_ids` - 1 belong to the tokenizer. The ids of SPECIAL_TOKENS and the sentinels follow.

    A sentinel stands for a removed span in span corruption.
    """

    num_tokenizer_ids: int
    eot: int  # end-of-document id, one of the ids of the tokenizer
    # [V, 2], with a row per id of the tokenizer: whether its text begins inside a word, and whether it ends inside one.
    word_edges_V2: npt.NDArray[np.bool_] | None = field(default=None, compare=False)

    def special_id(self, name: str) -> int:
        """Return the id of a special token, which SPECIAL_TOKENS lists by name."""
        return self.num_tokenizer_ids + SPECIAL_TOKENS.index(name)

    def sentinel_id(self, span_index: int) -> int:
        """Return the id of the sentinel for the span with this index, counted from 0."""
        return self.num_tokenizer_ids + len(SPECIAL_TOKENS) + span_index

    def describe_added_id(self, token: int) -> str | None:
        """Return a name for an id that is not of the tokenizer, such as `<mask>`; None for an id of the tokenizer."""
        index = token - self.num_tokenizer_ids
        if index < 0:
            return None
        return (
            f"<{SPECIAL_TOKENS[index]}>" if index < len(SPECIAL_TOKENS) else f"<sentinel {index - len(SPECIAL_TOKENS)}>"
        )
