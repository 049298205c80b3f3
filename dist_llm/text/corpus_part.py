"""Partition documents over the parts of `prepare --part`, for several machines. Each document is in one part."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from dist_llm.errors import DataError
from dist_llm.io.hashing import digest64

T = TypeVar("T")


@dataclass(frozen=True)
class CorpusPart:
    """Part `number` (from 1) of `of`. Documents are assigned by input file, by row number or by a hash of the text."""

    number: int = 1
    of: int = 1
    by: Literal["file", "row", "text"] = "file"

    @property
    def name(self) -> str:
        """The directory of the part inside the merged corpus."""
        return f"part-{self.number}-of-{self.of}"

    def select_files(self, files: Sequence[T]) -> list[T]:
        """Return the input files that this part reads."""
        return list(files[self.number - 1 :: self.of] if self.by == "file" else files)

    def owns_row(self, number: int) -> bool:
        """Return whether this part processes a row. `number` counts from 1 over all input files."""
        return self.by != "row" or (number - 1) % self.of == self.number - 1

    def owns_text(self, text: bytes) -> bool:
        """Return whether this part processes a text. Equal texts are in the same part, which deduplicates them."""
        if self.by != "text":
            return True
        digest = digest64(text)
        # Use the remainder: the high bits of the same hash select the held-out documents.
        return int.from_bytes(digest, "big") % self.of == self.number - 1

    @property
    def counts_textless_rows(self) -> bool:
        """Whether this part counts rows without text. By text, all parts read these rows and part 1 counts them."""
        return self.by != "text" or self.number == 1


SINGLE_PART = CorpusPart()


def parse_part(part: str) -> tuple[int, int]:
    """Parse `i/n` to (i, n). Raises DataError unless 1 <= i <= n."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part, re.ASCII)
    if not match or int(match[1]) > int(match[2]):
        raise DataError(f"--part {part}: expected i/n with 1 <= i <= n, as in 1/4, 2/4, 3/4 and 4/4")
    return int(match[1]), int(match[2])
