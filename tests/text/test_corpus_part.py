"""CorpusPart assigns each document to exactly one part, by its file, its row or its text."""

from collections import Counter

import pytest

from dist_llm.errors import DataError
from dist_llm.text.corpus_part import SINGLE_PART, CorpusPart, parse_part


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("split_by", ["file", "row", "text"])
def test_each_document_belongs_to_one_part(num_parts, split_by):
    files = [[f"{file} {row}" for row in range(5)] for file in range(8)]
    counts = Counter()
    for number in range(1, num_parts + 1):
        part, row_number = CorpusPart(number, num_parts, split_by), 0
        for file in part.select_files(files):
            for text in file:
                row_number += 1
                counts[text] += part.owns_row(row_number) and part.owns_text(text.encode())
    assert counts == Counter(text for file in files for text in file)


def test_parts_have_similar_sizes():
    for split_by in ("row", "text"):
        corpus_parts = [CorpusPart(number, num_parts=4, split_by=split_by) for number in range(1, 5)]
        sizes = [
            sum(part.owns_row(number) and part.owns_text(b"%d" % number) for number in range(1, 4001))
            for part in corpus_parts
        ]
        assert min(sizes) > 900, split_by  # the mean is 1000; hashed texts have a standard deviation of 27


def test_the_part_of_a_text_does_not_depend_on_the_heldout_split():
    from dist_llm.text.encode import is_heldout

    owned_texts = [
        text
        for number in range(4000)
        if CorpusPart(number=1, num_parts=2, split_by="text").owns_text(text := b"%d" % number)
    ]
    assert 0.45 < sum(is_heldout(text, fraction=0.5) for text in owned_texts) / len(owned_texts) < 0.55


def test_rows_without_text_are_counted_once():
    assert SINGLE_PART.counts_textless_rows
    assert [CorpusPart(part, num_parts=2, split_by="text").counts_textless_rows for part in (1, 2)] == [True, False]
    assert CorpusPart(number=2, num_parts=2, split_by="row").counts_textless_rows


@pytest.mark.parametrize("part", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1/ 2", "01/2"])
def test_an_invalid_part_is_refused_with_an_example(part):
    with pytest.raises(DataError, match="as in 1/4"):
        parse_part(part)


def test_parse_part_returns_the_index_and_the_number_of_parts():
    assert parse_part("2/12") == (2, 12)
