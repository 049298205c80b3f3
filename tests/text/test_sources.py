"""Each kind of source yields its documents in order, and locates what it skips."""

import gzip
import json
import sysconfig

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from dist_llm.errors import DataError
from dist_llm.text.rows import ENOUGH_ROWS, Tally
from dist_llm.text.sources import documents, open_sources, size_bytes

TEXTS = ["first", "second\nline\r\n", "", "漢字 🙂", " "]
LINES = b"".join(json.dumps({"n": n, "text": text}).encode() + b"\n" for n, text in enumerate(TEXTS))


def read(*specs, text_key="text", max_bad_rate=1.0):
    """The documents of the sources and the tally of the pass."""
    tally = Tally(max_bad_rate)
    sources = open_sources([str(spec) for spec in specs], text_key)
    found = list(documents(sources, tally))
    assert tally.bytes_read == (size_bytes(sources) or 0)
    assert tally.rows == len(found) + tally.bad_rows
    return found, tally


def texts(*specs, **options):
    return [document.text for document in read(*specs, **options)[0]]


def zstd(content):
    return zstandard.ZstdCompressor().compress(content)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSONL"])
@pytest.mark.parametrize(("pack", "ending"), [(bytes, ""), (gzip.compress, ".gz"), (zstd, ".zst")])
def test_json_lines(suffix, pack, ending, tmp_path):
    path = tmp_path / f"rows{suffix}{ending}"
    half = LINES.index(b"\n") + 1
    path.write_bytes(pack(LINES[:half]) + pack(b"\n  \n" + LINES[half:].rstrip()))  # two frames, blank lines, no end
    found, _ = read(path)
    assert [document.text for document in found] == TEXTS
    assert [document.origin for document in found] == [f"{path}:{number}" for number in (1, 4, 5, 6, 7)]


@pytest.mark.parametrize(("pack", "ending"), [(gzip.compress, ".gz"), (zstd, ".zst")])
def test_a_truncated_file_is_an_error_not_an_end(pack, ending, tmp_path):
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(pack(LINES * 1000)[:-9])
    with pytest.raises(DataError, match=r"rows\.jsonl.*Truncated"):
        read(path)


def test_text_files_and_folders(tmp_path):
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
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    want = ["print()", *TEXTS, "# z", "plain\r\ntext", "with a mark", "packed"]
    assert texts(tmp_path) == want
    assert texts(tmp_path / "d.txt.gz", tmp_path) == ["packed", *want]


def test_python_stdlib():
    found, tally = read("python-stdlib")
    origins = [document.origin for document in found]
    root = sysconfig.get_path("stdlib")
    assert tally.bad_rows == 0
    assert f"{root}/argparse.py" in origins
    assert origins == sorted(origins)
    folders = {part for origin in origins for part in origin.removeprefix(root).split("/")[:-1]}
    assert not folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(kind, tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"n": range(5000), "body": pa.array(TEXTS * 1000).cast(kind)}), path)
    found, _ = read(path, text_key="body")
    assert [document.text for document in found] == TEXTS * 1000
    assert found[-1].origin == f"{path}:5000"


def test_bad_rows_of_parquet(tmp_path):
    raw = pa.array([b"good", b"\xff", None, b"fine"], pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    parquet.write_table(pa.table({"text": unchecked}), tmp_path / "rows.parquet")
    found, tally = read(tmp_path / "rows.parquet")
    assert [document.text for document in found] == ["good", "fine"]
    assert tally.locations == [
        f"{tmp_path}/rows.parquet:2: not UTF-8",
        f"{tmp_path}/rows.parquet:3: no string under 'text'",
    ]


def test_a_parquet_file_without_the_column_or_the_format(tmp_path):
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="--text-key one of: body"):
        read(tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="as Parquet"):
        read(tmp_path / "rows.parquet")


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path):
    table = pa.table([["x"], ["y"], ["z"]], names=["text", "text", "body"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: 2 columns are called 'text'. Rename all but one"):
        read(tmp_path / "rows.parquet")


def test_bad_rows_of_json_lines_are_located_and_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": "\xff"}\n{"text": \n{"body": "x"}\n{"text": 3}\n["text"]\n'
        b'\n{"text": "\\ud800 mended"}\n'
    )
    found, tally = read(path)
    assert [document.text for document in found] == ["good", "\ufffd mended"]
    assert (tally.rows, tally.bad_rows) == (7, 5)
    assert [location.removeprefix(f"{path}:").split(":")[:2] for location in tally.locations] == [
        ["2", " not UTF-8"],
        ["3", " not JSON"],
        ["4", " no key 'text'"],
        ["5", " no string under 'text'"],
        ["6", " no string under 'text'"],
    ]


def test_a_text_file_that_is_not_utf8_is_located(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthree \xff\n")
    (tmp_path / "b.txt").write_bytes(b"fine")
    found, tally = read(tmp_path)
    assert [document.text for document in found] == ["fine"]
    assert tally.locations == [f"{tmp_path}/a.txt:3: not UTF-8"]


def test_a_json_array_is_refused_before_it_fills_the_memory(tmp_path):
    (tmp_path / "rows.json").write_text(' [\n{"text": "x"}]')
    with pytest.raises(DataError, match="one object a line"):
        read(tmp_path / "rows.json")


def test_the_rate_is_checked_early_and_at_the_end():
    tally = Tally(0.001, rows=ENOUGH_ROWS - 11)
    for number in range(10):
        tally.bad(f"f:{number}", "why")  # 10 of 9,999: too many, but too soon to tell
    with pytest.raises(DataError, match=r"10 of 9,999 rows are bad.*--max-bad-rate 0\.001(.|\n)*f:0: why\n  f:1: why"):
        tally.check()
    with pytest.raises(DataError, match="11 of 10,000"):
        tally.bad("f:10", "why")
    assert len(tally.locations) == 5
    Tally(0.001, rows=10_000, bad_rows=10).check()


def test_a_missing_source_fails_before_any_is_read(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: no such file"):
        open_sources(["python-stdlib", str(tmp_path / "gone.txt")])


def test_a_local_hugging_face_dataset(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [{"text": text} for text in TEXTS] + [{"text": None}]
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, tally = read(f"hf:{tmp_path / 'data'}")
    assert [document.text for document in found] == TEXTS
    assert tally.locations == [f"hf:{tmp_path}/data:6: no string under 'text'"]
    with pytest.raises(DataError, match="--hf-split"):
        open_sources([f"hf:{tmp_path / 'data'}"], hf_split="nosuch")


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    import datasets

    def unreachable(*args, **options):
        raise ConnectionError("a very long story " * 100)

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="hf:FOLDER") as caught:
        open_sources(["hf:some/name:config"])
    assert len(str(caught.value)) < 500
