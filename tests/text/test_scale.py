"""Full runs of `prepare` with parts, deduplication and filters, compared with one run and with plain Python.

A part is a share of the corpus that one job prepares; `merge_parts` joins the parts.
"""

import io
import json
from collections import Counter

import pytest

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import MANIFEST_FILE, SPLITS, CorpusManifest
from dist_llm.errors import DataError
from dist_llm.text import chunks
from dist_llm.text.encode import is_heldout
from dist_llm.text.filters import FilterChain
from dist_llm.text.merge import merge_parts
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.text.report import REPORT_FILE, PrepareReport, RemovalCounts, TextCount
from dist_llm.text.tokenizer import Tokenizer
from tests.text.prepare_runs import (
    make_prose,
    make_random_texts,
    read_all_files,
    read_documents,
    run_prepare,
    write_files,
    write_rows,
)
from tests.text.test_duplicates import compute_jaccard, make_texts_with_copies


def read_all_documents(out):
    """Return the documents of both splits as texts."""
    return [text for split in SPLITS for text in read_documents(out, split)]


def prepare_in_parts(source, out, num_parts, **options):
    """Prepare all parts, merge them and return the manifest."""
    for part in range(1, num_parts + 1):
        run_prepare(source, out, part=f"{part}/{num_parts}", **options)
    return merge_parts(out, io.StringIO())


@pytest.mark.parametrize("num_files", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"dedup": "exact"}, {"dedup": "exact", "filter": ("c4",)}], ids=str)
def test_merged_parts_equal_one_run(num_files, options, tmp_path):
    # There are 40 different texts. Their copies differ in the lines that c4 removes.
    texts = [make_prose(seed=n % 40) + "\nMenu" * (n % 3) for n in range(120)]
    source = write_files(tmp_path / "in", ["", *texts, ""], num_files)
    with open(tmp_path / "in" / "00.jsonl", "a") as file:
        file.write("broken\n")
    options = {**options, "max_bad_rate": 1, "tokenizer": "bpe:300", "heldout_fraction": 0.2}
    one_run = run_prepare(source, tmp_path / "one", **options)
    merged = prepare_in_parts(source, tmp_path / "parts", num_parts=3, **options)
    for split in SPLITS:
        assert Counter(read_documents(tmp_path / "parts", split)) == Counter(read_documents(tmp_path / "one", split))
        Corpus(tmp_path / "parts", split, verify="hash")
    assert merged == CorpusManifest.load(tmp_path / "parts")
    assert merged.bad_rows == one_run.bad_rows == 1
    assert Tokenizer.load(tmp_path / "parts") == Tokenizer.load(tmp_path / "one")
    one_report, parts_report = PrepareReport.load(tmp_path / "one"), PrepareReport.load(tmp_path / "parts")
    for field in ("rows", "bad_rows", "empty_documents", "kept", "removed", "options"):
        assert getattr(one_report, field) == getattr(parts_report, field), field
    assert one_report.rows == 123  # 120 texts, 2 empty texts and a broken row


def test_a_part_is_a_corpus_before_the_merge(tmp_path):
    source = write_files(tmp_path / "in", make_random_texts(60), num_files=3)
    run_prepare(source, tmp_path / "out", part="2/3")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-2-of-3"]
    assert Corpus(tmp_path / "out" / "part-2-of-3").num_tokens
    with pytest.raises(DataError, match="not a prepared corpus"):
        Corpus(tmp_path / "out")


def test_invalid_merges_are_refused(tmp_path):
    source, out = write_files(tmp_path / "in", make_random_texts(60), num_files=3), tmp_path / "out"
    with pytest.raises(DataError, match="has no parts"):
        merge_parts(out)
    run_prepare(source, out, part="1/2")
    with pytest.raises(DataError, match=r"part-2-of-2 is missing.*--part 2/2"):
        merge_parts(out)
    (out / "part-2-of-2").mkdir()
    with pytest.raises(DataError, match=r"part-2-of-2: not a prepared corpus"):
        merge_parts(out)
    (out / "part-2-of-2").rmdir()
    run_prepare(source, out, part="2/2", heldout_fraction=0.5)
    with pytest.raises(DataError, match=r"part-2-of-2 was made with heldout_fraction 0\.5, but part-1-of-2 with 0\.01"):
        merge_parts(out)
    run_prepare(source, out, part="2/2", tokenizer="bpe:300", overwrite=True)
    with pytest.raises(DataError, match="part-2-of-2 has a different tokenizer from part-1-of-2"):
        merge_parts(out)
    run_prepare(source, out, part="2/2", tokenizer=str(out / "part-1-of-2"), overwrite=True)
    shard = next((out / "part-2-of-2").glob("train*.bin"))
    shard_bytes = shard.read_bytes()
    shard.write_bytes(shard_bytes[:-1])
    with pytest.raises(DataError, match="truncated"):
        merge_parts(out)
    shard.write_bytes(shard_bytes)
    run_prepare(source, out, part="1/3")
    with pytest.raises(DataError, match="different numbers of parts: part-1-of-2, part-1-of-3, part-2-of-2"):
        merge_parts(out)
    assert not (out / MANIFEST_FILE).exists()
    (out / "part-1-of-3").rename(tmp_path / "elsewhere")
    assert merge_parts(out, io.StringIO()).count_documents("train")
    with pytest.raises(DataError, match="is a complete corpus"):
        run_prepare(source, out, part="1/2", overwrite=True)


def test_more_parts_than_documents_can_be_merged(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", ["one", "two"])
    merged = prepare_in_parts(source, tmp_path / "out", num_parts=3, heldout_fraction=0)
    assert merged.count_documents("train") == 2
    with pytest.raises(DataError, match="no text to train on in any part"):
        prepare_in_parts(write_rows(tmp_path / "b.jsonl", [""]), tmp_path / "none", num_parts=2)


def test_near_duplicates_cannot_be_found_in_parts(tmp_path):
    with pytest.raises(DataError, match="--dedup near: does not work with --part"):
        run_prepare(write_rows(tmp_path / "a.jsonl", ["x"]), tmp_path / "out", part="1/2", dedup="near")


@pytest.mark.parametrize("workers", [1, 3])
def test_exact_deduplication_keeps_the_first_of_equal_texts(workers, tmp_path):
    texts = (
        make_random_texts(300, max_words=3)
        + make_random_texts(20_000, max_words=60)
        + make_random_texts(300, max_words=3)
    )
    source = write_rows(tmp_path / "a.jsonl", texts)
    run_prepare(source, tmp_path / "out", dedup="exact", workers=workers, heldout_fraction=0)
    expected = list(dict.fromkeys(texts))
    assert read_documents(tmp_path / "out", "train") == expected
    removed_bytes = sum(len(text.encode()) for text in texts) - sum(len(text.encode()) for text in expected)
    assert PrepareReport.load(tmp_path / "out").removed == {
        "dedup.exact": TextCount(len(texts) - len(expected), lines=0, bytes=removed_bytes)
    }


def test_near_deduplication_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 10_000)
    texts = make_texts_with_copies(200, seed=7)
    source = write_rows(tmp_path / "a.jsonl", texts)
    for workers in (1, 2):
        run_prepare(source, tmp_path / str(workers), dedup="near", workers=workers, heldout_fraction=0.1)
    assert read_all_files(tmp_path / "1") == read_all_files(tmp_path / "2")
    kept_texts = read_all_documents(tmp_path / "1")
    assert 80 < len(kept_texts) < 160
    assert max(compute_jaccard(a, b) for n, a in enumerate(kept_texts) for b in kept_texts[:n]) < 0.93
    for text in set(texts) - set(kept_texts):
        assert max(compute_jaccard(text, other) for other in kept_texts) > 0.67


def test_the_report_counts_what_filters_remove(tmp_path):
    texts = (
        [make_prose(seed=n) for n in range(20)]
        + ["too short"] * 5
        + [make_prose(seed=90) + "\nMenu", make_prose() + " {}."]
    )
    source, stream = write_rows(tmp_path / "a.jsonl", ["", *texts]), io.StringIO()
    options = {"filter": ("gopher", "c4"), "heldout_fraction": 0.0, "workers": 1, "dedup": "exact"}
    prepare(PrepareOptions(source=(source,), tokenizer="bpe:300", out=tmp_path / "out", **options), stream)
    removed = RemovalCounts()
    kept_texts = [filtered for text in texts if (filtered := FilterChain(("gopher", "c4"))(text, removed)) is not None]
    assert read_documents(tmp_path / "out", "train") == kept_texts == [*texts[:20], make_prose(seed=90)]
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert (report["rows"], report["empty_documents"]) == (len(texts) + 1, 1)
    assert report["kept"] == {"documents": 21, "lines": 0, "bytes": sum(len(text.encode()) for text in kept_texts)}
    assert report["removed"]["gopher.word_count"] == {"documents": 5, "lines": 0, "bytes": 45}
    assert report["removed"]["c4.terminal_punctuation"] == {"documents": 0, "lines": 1, "bytes": 4}
    assert report["removed"]["c4.curly_bracket"]["documents"] == 1
    assert report["removed"]["gopher.stop_words"] == {"documents": 0, "lines": 0, "bytes": 0}
    assert list(report["removed"])[-1] == "dedup.exact"
    assert "gopher.word_count removed 5 documents, 0 lines, 45 bytes" in stream.getvalue()


def test_the_tokenizer_is_trained_on_filtered_text(tmp_path):
    clean_texts = [make_prose(seed=n) for n in range(30)]
    run_prepare(write_rows(tmp_path / "a.jsonl", clean_texts), tmp_path / "good", tokenizer="bpe:300")
    mixed = write_rows(tmp_path / "b.jsonl", ["qqqq zzzz " * 30, *clean_texts])
    run_prepare(mixed, tmp_path / "mixed", tokenizer="bpe:300", filter=("gopher",))
    assert Tokenizer.load(tmp_path / "mixed") == Tokenizer.load(tmp_path / "good")


def test_the_heldout_split_does_not_depend_on_parts(tmp_path):
    texts = make_random_texts(200)
    prepare_in_parts(write_rows(tmp_path / "a.jsonl", texts), tmp_path / "out", num_parts=2, heldout_fraction=0.3)
    assert all(is_heldout(text.encode(), fraction=0.3) for text in read_documents(tmp_path / "out", "heldout"))
    assert len(read_all_documents(tmp_path / "out")) == 200
