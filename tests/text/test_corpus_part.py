"""Each document belongs to exactly one part, for each way to assign documents."""

from collections import Counter

import pytest

from dist_llm.errors import DataError
from dist_llm.text.corpus_part import SINGLE_PART, CorpusPart, parse_part


@pytest.mark.parametrize("of", [1, 2, 3, 7])
@pytest.mark.parametrize("by", ["file", "row", "text"])
def test_each_document_belongs_to_one_part(of, by):
    files = [[f"{file} {row}" for row in range(5)] for file in range(8)]
    found = Counter()
    for index in range(1, of + 1):
        part, number = CorpusPart(index, of, by), 0
        for file in part.select_files(files):
            for text in file:
                number += 1
                found[text] += part.owns_row(number) and part.owns_text(text.encode())
    assert found == Counter(text for file in files for text in file)


def test_parts_are_of_like_size():
    for by in ("row", "text"):
        parts = [CorpusPart(index, 4, by) for index in range(1, 5)]
        sizes = [sum(part.owns_row(n) and part.owns_text(b"%d" % n) for n in range(1, 4001)) for part in parts]
        assert min(sizes) > 900, by  # 1000, with a standard deviation of 27 where texts are hashed


def test_the_part_of_a_text_says_nothing_of_whether_it_is_held_out():
    from dist_llm.text.encode import is_heldout

    mine = [text for n in range(4000) if CorpusPart(1, 2, "text").owns_text(text := b"%d" % n)]
    assert 0.45 < sum(is_heldout(text, 0.5) for text in mine) / len(mine) < 0.55


def test_who_counts_rows_without_text():
    assert SINGLE_PART.counts_textless_rows
    assert [CorpusPart(part, 2, "text").counts_textless_rows for part in (1, 2)] == [True, False]
    assert CorpusPart(2, 2, "row").counts_textless_rows


@pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1/ 2", "01/2"])
def test_a_wrong_part_says_what_is_right(part):
    with pytest.raises(DataError, match="as in 1/4"):
        parse_part(part)


def test_a_part():
    assert parse_part("2/12") == (2, 12)
