"""Run `prepare` in tests: write source files, prepare a corpus, and read its documents.

    source = write_rows(tmp_path / "rows.jsonl", make_random_texts(100))
    manifest = run_prepare(source, tmp_path / "corpus", tokenizer="bpe:300")  # in this process
    texts = read_documents(tmp_path / "corpus", "train")

`start_prepare` runs it in a process of its own, which a test can kill.
"""

import io
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm.data.shard import CorpusManifest, Split
from dist_llm.text.options import PrepareOptions
from dist_llm.text.prepare import prepare
from dist_llm.text.tokenizer import Tokenizer

FRAGMENTS = [f"{start}{end}" for start in ("sh", "tr", "qu", "é", "漢") for end in ("ip", "ade", " 12", "it's", "\n")]


def make_random_texts(count: int, max_words: int = 60, seed: int = 0) -> list[str]:
    """Return `count` texts of up to `max_words` fragments."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(FRAGMENTS, k=rng.randint(1, max_words))) for _ in range(count)]


def write_rows(path: Path, texts: Iterable[str]) -> str:
    """Write the texts as rows of a JSON lines file; return its path as a string."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_megabytes(path: Path, megabytes: int) -> str:
    """Write a JSONL file of about this size quickly."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in make_random_texts(2000, max_words=200))
    with path.open("w") as file:
        for _ in range(-(-megabytes * 1_000_000 // len(rows))):
            file.write(rows)
    return str(path)


def run_prepare(source: str | Sequence[str], out: Path, **changes: Any) -> CorpusManifest:
    """Prepare with the tokenizer `byte` and one worker, unless `changes` has other options."""
    options: dict[str, Any] = {"tokenizer": "byte", "workers": 1, **changes}
    sources = (source,) if isinstance(source, str) else tuple(source)
    return prepare(PrepareOptions(source=sources, out=out, **options), io.StringIO())


def read_documents(out: Path, split: Split) -> list[str]:
    """Return the texts of a split. Check that each document has one `<|endoftext|>`, at its end."""
    manifest, tokenizer, texts = CorpusManifest.load(out), Tokenizer.load(out), list[str]()
    for shard in manifest.shards[split]:
        ids = np.fromfile(out / shard.file, dtype=np.dtype(manifest.dtype).newbyteorder("<"))
        starts = np.fromfile((out / shard.file).with_suffix(".offsets"), dtype="<u8").astype(int)
        assert (len(ids), len(starts)) == (shard.tokens, shard.documents)
        for document in np.split(ids, starts[1:]):
            assert np.flatnonzero(document == tokenizer.eot).tolist() == [len(document) - 1]
            texts.append(tokenizer.decode(document[:-1]))
    return texts


def read_all_files(directory: Path) -> dict[str, bytes]:
    """Return the content of all files of a directory by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# Argument: options of `prepare` as JSON. Prints the peak memory of the process and of its children, in KiB.
PREPARE_SCRIPT = """
import json, resource, sys
from pathlib import Path
from dist_llm.errors import DataError
from dist_llm.text import chunks
from dist_llm.text.prepare import PrepareOptions, prepare
fields = json.loads(sys.argv[1])
chunks.RESUME_POINT_CHARS = fields.pop("resume_point_chars", chunks.RESUME_POINT_CHARS)
if max_file_bytes := fields.pop("max_file_bytes", 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
try:
    prepare(PrepareOptions(**{**fields, "source": tuple(fields["source"]), "out": Path(fields["out"])}))
except DataError as error:
    sys.exit(f"DataError: {error}")
print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def start_prepare(source: str, out: Path, **fields: Any) -> subprocess.Popen[str]:
    """Start a process that prepares the source and prints its peak memory."""
    fields = {"source": [source], "out": str(out), "tokenizer": "byte", "workers": 2, **fields}
    command = [sys.executable, "-c", PREPARE_SCRIPT, json.dumps(fields)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_alive(pid: int | str) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], Any], timeout_seconds: float = 60) -> Any:
    """Wait until `condition()` is true and return its result."""
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "the condition must be met in time"
        time.sleep(0.01)
    return result


def count_rows(source: str) -> int:
    """Return the number of lines of a file."""
    with open(source) as file:
        return sum(1 for _ in file)


def make_prose(num_sentences: int = 8, seed: int = 0) -> str:
    """Return English text that passes all rules of the filters, with one sentence per line."""
    rng = random.Random(seed)
    names = ["ship", "boat", "crew", "captain", "ferry", "barge", "raft", "pilot", "clerk", "baker"]
    verbs = ["saw", "met", "lost", "found", "drew", "sold", "kept", "heard", "left", "won"]
    tails = ["at dawn", "by night", "in spring", "on Monday", "near home", "past noon", "last year", "too late"]
    colours = ["red", "blue", "pale", "dark", "green", "grey", "brown", "white", "warm", "cold"]

    def pick(pool: Sequence[str]) -> str:
        return rng.choice(pool)

    return "\n".join(
        f"{pick(colours).title()} {pick(names)} {n} {pick(verbs)} the {pick(colours)} {pick(names)} and "
        f"{pick(verbs)} some {pick(names)} {pick(tails)}."
        for n in range(num_sentences)
    )


def write_files(directory: Path, texts: Sequence[str], num_files: int) -> str:
    """Distribute the texts over this number of JSONL files, in order. Return the directory."""
    directory.mkdir()
    texts_per_file = -(-len(texts) // num_files)
    for index in range(num_files):
        file_texts = texts[index * texts_per_file : (index + 1) * texts_per_file]
        write_rows(directory / f"{index:02d}.jsonl", file_texts)
    return str(directory)
