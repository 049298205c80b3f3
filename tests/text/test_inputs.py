"""open_inputs reads each kind of source in order, and reports the location of each bad row."""

import bz2
import gzip
import json
import lzma
import os
import sysconfig

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from dist_llm.errors import DataError
from dist_llm.text.inputs import DEFAULT_RULES, iter_documents, open_inputs, sum_size_bytes
from dist_llm.text.report import FileCount, InputFileCounts
from dist_llm.text.rows import MIN_ROWS, RowFormat, RowTracker
from dist_llm.text.walk import FileRules

TEXTS = ["first", "second\nline\r\n", "", "漢字 🙂", " "]
LINES = b"".join(json.dumps({"n": number, "text": text}).encode() + b"\n" for number, text in enumerate(TEXTS))


def read_sources(*specs, text_key="text", max_bad_rate=1.0, rules=DEFAULT_RULES, file_counts=None, separator=None):
    """Return the documents of the sources and the row counts."""
    row_tracker = RowTracker(max_bad_rate, skip_unreadable=rules.skip_unreadable)
    sources = open_inputs(
        [str(spec) for spec in specs], RowFormat(text_key, separator=separator), rules=rules, file_counts=file_counts
    )
    documents = list(iter_documents(sources, row_tracker))
    assert row_tracker.bytes_read == (sum_size_bytes(sources) or 0)
    assert row_tracker.rows == len(documents) + row_tracker.bad_rows
    return documents, row_tracker


def read_texts(*specs, **options):
    """Return the texts of all documents."""
    return [document.text for document in read_sources(*specs, **options)[0]]


def compress_zstd(content):
    """Return the content in the format zstd."""
    return zstandard.ZstdCompressor().compress(content)


COMPRESSORS = [
    (bytes, ""),
    (gzip.compress, ".gz"),
    (compress_zstd, ".zst"),
    (bz2.compress, ".bz2"),
    (lzma.compress, ".xz"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
@pytest.mark.parametrize(("compress", "ending"), COMPRESSORS)
def test_json_lines_are_read_in_order(suffix, compress, ending, tmp_path):
    path = tmp_path / f"rows{suffix}{ending}"
    first_line_end = LINES.index(b"\n") + 1
    # Two compressed frames, blank lines, and no newline at the end.
    path.write_bytes(compress(LINES[:first_line_end]) + compress(b"\n  \n" + LINES[first_line_end:].rstrip()))
    documents, _ = read_sources(path)
    assert [document.text for document in documents] == TEXTS
    assert [document.origin for document in documents] == [f"{path}:{number}" for number in (1, 4, 5, 6, 7)]


@pytest.mark.parametrize(("compress", "ending"), COMPRESSORS[1:])
def test_a_truncated_file_is_an_error(compress, ending, tmp_path):
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(compress(LINES * 1000)[:-9])
    with pytest.raises(DataError, match=r"rows\.jsonl.*Truncated"):
        read_sources(path)


def test_a_folder_is_read_in_order_without_hidden_and_unknown_files(tmp_path):
    for name, content in {
        "b.txt": "plain\r\ntext",
        "a/z.md": "# z",
        "a.py": "print()",
        "c.unknown": "\ufeffwith a mark",
        ".hidden": "no",
        ".git/config": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "a/rows.jsonl").write_bytes(LINES)
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "loop").symlink_to(tmp_path)
    expected_texts = ["print()", *TEXTS, "# z", "plain\r\ntext", "with a mark", "packed"]
    assert read_texts(tmp_path) == expected_texts
    assert read_texts(tmp_path / "d.txt.gz", tmp_path) == ["packed", *expected_texts]


def test_python_stdlib_has_no_tests_and_no_installed_packages():
    documents, row_tracker = read_sources("python-stdlib")
    origins = [document.origin for document in documents]
    root = sysconfig.get_path("stdlib")
    assert row_tracker.bad_rows == 0
    assert f"{root}/argparse.py" in origins
    assert origins == sorted(origins)
    folders = {directory for origin in origins for directory in origin.removeprefix(root).split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_of_each_string_type_are_read(kind, tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"n": range(5000), "body": pa.array(TEXTS * 1000).cast(kind)}), path)
    documents, _ = read_sources(path, text_key="body")
    assert [document.text for document in documents] == TEXTS * 1000
    assert documents[-1].origin == f"{path}:5000"


def test_bad_rows_of_parquet_are_located_and_skipped(tmp_path):
    raw_values = pa.array([b"good", b"\xff", None, b"fine"], pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), len(raw_values), raw_values.buffers())
    parquet.write_table(pa.table({"text": unchecked}), tmp_path / "rows.parquet")
    documents, row_tracker = read_sources(tmp_path / "rows.parquet")
    assert [document.text for document in documents] == ["good", "fine"]
    assert row_tracker.locations == [
        f"{tmp_path}/rows.parquet:2: not UTF-8",
        f"{tmp_path}/rows.parquet:3: no string under 'text'",
    ]


def test_a_parquet_file_without_the_text_column_is_refused(tmp_path):
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="--text-key one of: body"):
        read_sources(tmp_path / "rows.parquet")


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pa.table([["x"], ["y"], ["z"]], names=["text", "text", "body"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: 2 columns have the name 'text'. Rename all but one"):
        read_sources(tmp_path / "rows.parquet")


def test_bad_rows_of_json_lines_are_located_and_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": "\xff"}\n{"text": \n{"body": "x"}\n{"text": 3}\n["text"]\n'
        b'\n{"text": "\\ud800 mended"}\n'
    )
    documents, row_tracker = read_sources(path)
    assert [document.text for document in documents] == ["good", "\ufffd mended"]
    assert (row_tracker.rows, row_tracker.bad_rows) == (7, 5)
    assert [location.removeprefix(f"{path}:").split(":")[:2] for location in row_tracker.locations] == [
        ["2", " not UTF-8"],
        ["3", " not JSON"],
        ["4", " no key 'text'"],
        ["5", " no string under 'text'"],
        ["6", " no string under 'text'"],
    ]


SKIP_UNREADABLE = FileRules(skip_unreadable=True)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"one\ntwo\nthree \xff\n", "line 3: not UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16"), "UTF-16"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16"),
        ("a.txt", "ascii\ntext".encode("utf-16-le"), "line 1: a NUL byte"),
        ("a.txt", b"ok\n\x00\x01", "line 2: a NUL byte"),
        ("a.txt.lz4", b"x", "compressed as .lz4"),
        ("a.zip", b"PK", "compressed as .zip"),
        ("a.parquet", b"not parquet at all", "as Parquet"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "Truncated"),
    ],
)
def test_an_unreadable_file_is_an_error_unless_it_may_be_skipped(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"fine")
    with pytest.raises(DataError, match=rf"{name}: (.|\n)*{reason}(.|\n)*--exclude(.|\n)*--skip-unreadable"):
        read_sources(tmp_path)
    file_counts = InputFileCounts()
    documents, row_tracker = read_sources(tmp_path, rules=SKIP_UNREADABLE, file_counts=file_counts)
    assert documents[-1].text == "fine"
    for path, (size, actual_reason) in row_tracker.unreadable.items():
        assert (path, size) == (str(tmp_path / name), len(content))
        assert reason in actual_reason
    skipped_kinds = {"skipped: unreadable"} & file_counts.keys()
    assert bool(row_tracker.unreadable) != bool(skipped_kinds), "the file must be reported exactly once"
    assert read_sources(tmp_path, rules=FileRules(exclude=("a.*",)))[0][0].text == "fine"


def test_folders_without_permission_and_broken_links_are_errors(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b.txt").write_text("fine")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    scandir = os.scandir

    def scan_or_fail(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan_or_fail)
    with pytest.raises(DataError, match=r"2 files or folders(.|\n)*/a: Permission(.|\n)*dangling\.txt: a broken link"):
        read_sources(tmp_path)
    assert read_texts(tmp_path, rules=SKIP_UNREADABLE) == ["fine"]


def test_a_linked_folder_is_read_once(tmp_path):
    outside, root = tmp_path / "away", tmp_path / "root"
    (outside / "deep").mkdir(parents=True)
    root.mkdir()
    (outside / "deep/x.txt").write_text("x")
    (root / "a.txt").write_text("a")
    (outside / "up").symlink_to(outside)
    for name, target in (("l1", outside), ("l2", outside), ("up", tmp_path), ("self", root)):
        (root / name).symlink_to(target)
    file_counts = InputFileCounts()
    assert read_texts(root, file_counts=file_counts) == ["a", "x"]
    assert file_counts["skipped: folder read already"]["folder"].files == 4


def test_skipped_files_are_counted_by_reason(tmp_path):
    names = ["a.txt", "a.txt.md5", "SHA256SUMS", "a.txt~", "#b.txt#", "b.txt.bak", ".hidden", "README.md", "LICENSE"]
    for name in names:
        (tmp_path / name).write_text("abc")
    file_counts = InputFileCounts()
    assert read_texts(tmp_path, file_counts=file_counts) == ["abc"]
    assert file_counts["read"] == {".txt": FileCount(files=1, bytes=3)}
    assert file_counts["skipped: checksum"] == {
        ".txt.md5": FileCount(files=1, bytes=3),
        "no suffix": FileCount(files=1, bytes=3),
    }
    assert sum(count.files for count in file_counts["skipped: editor backup"].values()) == 3
    assert file_counts["skipped: README or LICENSE"] == {
        ".md": FileCount(files=1, bytes=3),
        "no suffix": FileCount(files=1, bytes=3),
    }
    assert sum(count.files for counts in file_counts.values() for count in counts.values()) == len(names)
    assert ["skipped:", "checksum", ".txt.md5", "1", "3"] in [line.split() for line in file_counts.format_lines()]
    (tmp_path / "more.md").write_text("abc")
    assert len(read_texts(tmp_path)) == 3, "a README beside another .md file must be read"
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert len(read_texts(tmp_path)) == 2 + len(TEXTS), "a README beside a file of rows must be skipped"


def test_include_and_exclude_select_files(tmp_path):
    for name in ("a.txt", "b.py", "README.md", "sub/c.txt", "sub/deep/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    file_counts = InputFileCounts()
    assert read_texts(
        tmp_path, rules=FileRules(include=("*.txt", "README.md"), exclude=("sub/deep/*",)), file_counts=file_counts
    ) == [
        "README.md",
        "a.txt",
        "sub/c.txt",
    ]
    assert file_counts["skipped: --exclude"] == {".txt": FileCount(files=1, bytes=14)}
    assert file_counts["skipped: not in --include"] == {".py": FileCount(files=1, bytes=4)}
    for rules in (FileRules(include=("*.tex",)), FileRules(exclude=("*.tex",))):
        with pytest.raises(DataError, match=r"--(in|ex)clude \*\.tex: matches no file"):
            read_sources(tmp_path, rules=rules)


def test_bad_bytes_count_in_the_bad_rate():
    row_tracker = RowTracker(0.01)
    for _ in range(999):
        row_tracker.count_good(10)
    row_tracker.count_bad("f:1", "why", 5000)
    with pytest.raises(DataError, match=r"5,000 of 14,990 bytes are in bad rows, more than --max-bad-rate 0\.01"):
        row_tracker.check()


def test_a_json_array_is_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "rows.json").write_text(' [\n{"text": "x"}]')
    with pytest.raises(DataError, match="one object per line"):
        read_sources(tmp_path / "rows.json")


def test_the_bad_rate_is_checked_early_and_at_the_end():
    row_tracker = RowTracker(0.001, rows=MIN_ROWS - 11)
    for number in range(10):
        row_tracker.count_bad(f"f:{number}", "why", 0)  # 10 of 9,999: above the rate, but too early to check
    with pytest.raises(DataError, match=r"10 of 9,999 rows are bad.*--max-bad-rate 0\.001(.|\n)*f:0: why\n  f:1: why"):
        row_tracker.check()
    with pytest.raises(DataError, match="11 of 10,000"):
        row_tracker.count_bad("f:10", "why", 0)
    assert len(row_tracker.locations) == 5
    RowTracker(0.001, rows=10_000, bad_rows=10).check()


def test_a_missing_source_fails_before_any_is_read(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        open_inputs(["python-stdlib", str(tmp_path / "gone.txt")])


def test_a_local_hugging_face_dataset_is_read(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [{"text": text} for text in TEXTS] + [{"text": None}]
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, row_tracker = read_sources(f"hf:{tmp_path / 'data'}")
    assert [document.text for document in documents] == TEXTS
    assert row_tracker.locations == [f"hf:{tmp_path}/data:6: no string under 'text'"]
    with pytest.raises(DataError, match="--hf-split"):
        open_inputs([f"hf:{tmp_path / 'data'}"], hf_split="nosuch")


def test_an_unreachable_hub_is_an_error_with_a_hint(monkeypatch):
    import datasets

    def raise_connection_error(*args, **options):
        raise ConnectionError("a very long story " * 100)

    monkeypatch.setattr(datasets, "load_dataset", raise_connection_error)
    with pytest.raises(DataError, match="hf:FOLDER") as excinfo:
        open_inputs(["hf:some/name:config"])
    assert len(str(excinfo.value)) < 500


@pytest.mark.parametrize(
    ("separator", "content", "expected_texts"),
    [
        ("<|endoftext|>", "one\nmore\n<|endoftext|>\ntwo\n\n<|endoftext|>\n", ["one\nmore", "two\n"]),
        ("<|endoftext|>", "one<|endoftext|>two<|endoftext|>\nthree\n", ["one", "two", "three"]),
        ("<|endoftext|>", "<|endoftext|>one\n<|endoftext|> \n<|endoftext|>two", ["one", "two"]),
        ("---", "one\r\n---\r\ntwo\r\n", ["one", "two"]),
        ("blank-lines", "one\nmore\n\n \n\ntwo\n\n", ["one\nmore", "two"]),
        ("blank-lines", "\ufeff\r\none\r\n\r\ntwo", ["one", "two"]),
        ("---", "", []),
        ("---", "no mark\n", ["no mark"]),
    ],
)
def test_a_separator_splits_a_text_file(separator, content, expected_texts, tmp_path):
    (tmp_path / "a.txt").write_bytes(content.encode())
    documents, _ = read_sources(tmp_path / "a.txt", separator=separator)
    assert [document.text for document in documents] == expected_texts
    for document in documents:
        line = int(document.origin.rpartition(":")[2])
        assert document.text.splitlines()[0] in content.removeprefix("\ufeff").splitlines()[line - 1]


def test_a_separated_document_that_is_not_utf8_is_a_bad_row(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n---\nt\xffo\n---\nthree\n")
    documents, row_tracker = read_sources(tmp_path / "a.txt", separator="---")
    assert [document.text for document in documents] == ["one", "three"]
    assert (row_tracker.rows, row_tracker.bad_rows, row_tracker.bad_bytes) == (3, 1, 3)
    assert row_tracker.locations[0].startswith(f"{tmp_path}/a.txt:3: line 3: not UTF-8")
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match="--separator: only for text files, but the sources have none"):
        read_sources(tmp_path / "rows.jsonl", separator="---")


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
def test_the_text_column_of_a_table_is_read(suffix, separator, tmp_path):
    path = tmp_path / f"rows{suffix}"
    rows = [
        ["n", "body"],
        ["1", "first"],
        ["2", f'"second{separator} ""quoted""\nline"'],
        ["3", "漢字"],
        ["4"],
        ["5", ""],
    ]
    content = "\ufeff" + "".join(separator.join(row) + "\r\n" for row in rows)
    path.write_bytes(content.encode() + separator.join(["6", "b\udcffd"]).encode("utf-8", "surrogateescape") + b"\n")
    documents, row_tracker = read_sources(path, text_key="body")
    assert [document.text for document in documents] == ["first", f'second{separator} "quoted"\nline', "漢字", ""]
    assert [location.removeprefix(f"{path}:") for location in row_tracker.locations] == [
        "6: no string under 'body'",
        "8: not UTF-8",
    ]
    with pytest.raises(DataError, match=r"no column 'text'.*--text-key one of: n, body.*--exclude"):
        read_sources(path)
    prompt_format = RowFormat("body", prompt_key="question")
    with pytest.raises(DataError, match=r"no column 'question'.*--prompt-key one of: n, body"):
        list(iter_documents(open_inputs([str(path)], prompt_format), RowTracker(0.0)))
    path.write_bytes(b'body\n"never closed\n1\n2\n')
    with pytest.raises(DataError, match=rf"{suffix}: cannot be read: line \d: not readable as {suffix}"):
        read_sources(path, text_key="body")


def test_the_text_key_may_be_nested_or_name_a_list(tmp_path):
    rows = [
        {"data": {"content": "a"}},
        {"data.content": "b", "data": {"content": "no"}},
        {"data": {"content": ["p1", "p2"]}},
        {"data": {}},
        {"data": "x"},
        {"data": {"content": ["p", 1]}},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, row_tracker = read_sources(tmp_path / "rows.jsonl", text_key="data.content")
    assert [document.text for document in documents] == ["a", "b", "p1\n\np2"]
    assert [location.rpartition(": ")[2] for location in row_tracker.locations] == [
        "no key 'data.content'",
        "no key 'data.content'",
        "no string under 'data.content'",
    ]
    table = pa.table({"data": [{"content": "a"}, {"content": None}], "paragraphs": [["p1", "p2"], []]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read_texts(tmp_path / "rows.parquet", text_key="data.content") == ["a"]
    assert read_texts(tmp_path / "rows.parquet", text_key="paragraphs") == ["p1\n\np2"]


@pytest.mark.parametrize("has_splits", [False, True])
def test_a_saved_dataset_is_read(has_splits, tmp_path):
    import datasets

    saved = datasets.Dataset.from_dict({"text": TEXTS})
    (datasets.DatasetDict({"train": saved}) if has_splits else saved).save_to_disk(tmp_path / "saved")
    assert read_texts(tmp_path / "saved") == TEXTS


def test_a_zstd_file_with_a_large_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=29, compression_level=1, enable_ldm=False)
    # The compressor does not know the size of the content, so it does not reduce the window.
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(LINES) + compressor.flush())
    assert read_texts(tmp_path / "a.jsonl.zst") == TEXTS


def test_zero_bytes_after_a_gzip_file_are_ignored(tmp_path):
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES) + bytes(100_000))
    assert read_texts(tmp_path / "b.jsonl.gz") == TEXTS
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES) + bytes(100_000) + b"rubbish")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: cannot be read: damaged \.gz file"):
        read_sources(tmp_path / "b.jsonl.gz")
