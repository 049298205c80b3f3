"""Assign documents to the parts of `prepare --part i/n`, which run on several machines. A document is in one part."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from dist_llm.errors import DataError
from dist_llm.io.hashing import digest64

T = TypeVar("T")


@dataclass(frozen=True)
class CorpusPart:
    """Part `number` (counted from 1) of `num_parts`.

    `split_by` says how documents are assigned to parts: by input file, by row number, or by a hash of the text.
    """

    number: int = 1
    num_parts: int = 1
    split_by: Literal["file", "row", "text"] = "file"

    @property
    def name(self) -> str:
        """The directory of the part inside the merged corpus."""
        return f"part-{self.number}-of-{self.num_parts}"

    def select_files(self, files: Sequence[T]) -> list[T]:
        """Return the input files that this part reads."""
        return list(files[self.number - 1 :: self.num_parts] if self.split_by == "file" else files)

    def owns_row(self, row_number: int) -> bool:
        """Return whether this part processes a row. `row_number` counts from 1 over all input files."""
        return self.split_by != "row" or (row_number - 1) % self.num_parts == self.number - 1

    def owns_text(self, text: bytes) -> bool:
        """Return whether this part processes a text.

        With `split_by` "text", equal texts are in the same part, so that each part can remove exact duplicates without
        the texts of the other parts.
        """
        if self.split_by != "text":
            return True
        # The part is the remainder, because the high bits of the same hash select the held-out documents.
        return int.from_bytes(digest64(text), "big") % self.num_parts == self.number - 1

    @property
    def counts_textless_rows(self) -> bool:
        """Whether this part counts rows without text.

        With `split_by` "text", all parts read these rows, and only part 1 counts them.
        """
        return self.split_by != "text" or self.number == 1


SINGLE_PART = CorpusPart()


class PartNumber(NamedTuple):
    """The value `i/n` of --part."""

    number: int  # i, from 1 to n
    num_parts: int


def parse_part(part: str) -> PartNumber:
    """Parse `i/n`. Raises DataError unless 1 <= i <= n."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part, re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise DataError(f"--part {part}: expected i/n with 1 <= i <= n, as in 1/4, 2/4, 3/4 and 4/4")
    return PartNumber(int(match[1]), int(match[2]))
