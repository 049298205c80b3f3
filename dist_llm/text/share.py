"""Which documents a part of a prepare over several machines takes: each document is one part's alone."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from dist_llm.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Part `part` (from 1) of `of`, dealt out by input file, by row number or by a hash of the text."""

    part: int = 1
    of: int = 1
    by: Literal["file", "row", "text"] = "file"

    @property
    def name(self) -> str:
        """The directory of the part, within the corpus that is made of all parts."""
        return f"part-{self.part}-of-{self.of}"

    def files(self, sources: Sequence[T]) -> list[T]:
        """The input files it reads."""
        return list(sources[self.part - 1 :: self.of] if self.by == "file" else sources)

    def has_row(self, number: int) -> bool:
        """Whether it takes a row; `number` counts from 1 over all input files."""
        return self.by != "row" or (number - 1) % self.of == self.part - 1

    def has_text(self, text: bytes) -> bool:
        """Whether it takes a text: copies are all one part's, so that one part can see that they are copies."""
        if self.by != "text":
            return True
        draw = hashlib.blake2b(text, digest_size=8).digest()
        # The remainder, not the upper end of the draw, which says already what is held out.
        return int.from_bytes(draw, "big") % self.of == self.part - 1

    @property
    def counts_textless(self) -> bool:
        """Whether it counts rows without text: where shares go by text all parts meet them, and the first counts."""
        return self.by != "text" or self.part == 1


WHOLE = Share()


def read_part(part: str) -> tuple[int, int]:
    """The two numbers of `i/n`. Raises DataError where they are not 1 <= i <= n."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part, re.ASCII)
    if not found or int(found[1]) > int(found[2]):
        raise DataError(f"--part {part}: expected i/n with 1 <= i <= n, as in 1/4, 2/4, 3/4 and 4/4")
    return int(found[1]), int(found[2])
