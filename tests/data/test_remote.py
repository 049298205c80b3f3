"""A remote file is fetched completely or not at all.

Readers that share a cache fetch it once, and a killed download leaves no incomplete file.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dist_llm.config.data_sections import DataConfig
from dist_llm.data import remote
from dist_llm.data.corpus import Corpus
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import build_loader
from dist_llm.data.mirror import localize_corpus
from dist_llm.data.remote import fetch
from dist_llm.data.shard import CorpusManifest, Shard, ShardWriter
from dist_llm.errors import DataError
from dist_llm.io import locks as file_locks
from dist_llm.io import urls
from dist_llm.io.urls import as_path, is_remote
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from tests.laws.law import make_config

TOKENIZER = b'{"some": "tokenizer"}'


class FileServer:
    """An HTTP server of files in memory, which can send faulty answers."""

    def __init__(self):
        self.files = {}  # path: content
        self.requested_paths = []  # in order
        self.planned_faults = []  # of the next answers: "busy" (HTTP 503), "cut" (half the content), "damage" or ""
        self.pause_seconds = 0.0  # in the middle of each file except JSON
        self.shard_requested, self.closing = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requested_paths.append(self.path)
                content = server.files.get(self.path)
                fault = server.planned_faults.pop(0) if server.planned_faults else ""
                status = 404 if content is None else 503 if fault == "busy" else 200
                self.send_response(status)
                content = content if status == 200 else b""
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if fault == "damage":
                    content = b"?" + content[1:]
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if not self.path.endswith(".json"):
                    pause_seconds = server.pause_seconds  # a test may change it after the next line
                    server.shard_requested.set()
                    server.closing.wait(pause_seconds)
                if fault != "cut":
                    with suppress(ConnectionError):  # the client was killed
                        self.wfile.write(content[len(content) // 2 :])

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server():
    """A file server that runs during the test."""
    server = FileServer()
    yield server
    server.close()


@pytest.fixture
def retry_pauses(monkeypatch):
    """Replace `sleep`. Return the list of the seconds that retries would have slept."""
    pauses = []
    monkeypatch.setattr(urls.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def corpus(tmp_path):
    """Write a local corpus of three shards. Return its directory and all its tokens as one array."""
    directory = tmp_path / "local"
    directory.mkdir()
    documents = [np.random.default_rng(seed).integers(0, 300, 20 + seed) for seed in range(3)]
    writer = ShardWriter(directory, "train", "uint16", max_tokens=1)
    for document in documents:
        writer.add(document, text_bytes=len(document))
    digest = hashlib.sha256(TOKENIZER).hexdigest()
    CorpusManifest(
        "uint16",
        vocab_size=300,
        tokenizer_sha256=digest,
        source=("random",),
        shards={"train": writer.close(), "heldout": ()},
    ).save(directory)
    (directory / "tokenizer.json").write_bytes(TOKENIZER)
    return directory, np.concatenate(documents)


def add_to_server(server, directory):
    """Add the files of the directory to the server and return their URL."""
    server.files.update({f"/c/{path.name}": path.read_bytes() for path in directory.iterdir()})
    return f"{server.url}/c"


def put_in_memory(directory):
    """Copy the corpus to a memory: URL and return the URL."""
    fsspec.filesystem("memory").put(str(directory) + "/", "/c/", recursive=True)
    return "memory://c"


def open_corpus(url, cache, split="train"):
    """Open a remote corpus with a local cache, as a run does."""
    return Corpus.from_config(DataConfig(path=url, cache=str(cache), seq_len=4, global_batch=4, micro_batch=4), split)


def compute_digest(content):
    """Return the SHA-256 of bytes with the prefix that a manifest uses."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def list_files(directory):
    """Return the relative paths of all files below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_is_remote_and_as_path():
    assert [is_remote(location) for location in ("http://a/b", "s3://a", "memory://c", "hf://datasets/x")] == [True] * 4
    assert [is_remote(location) for location in ("a/b", "/a/b", "file:///a/b", "C:/a", "./a://b")] == [False] * 5
    assert str(as_path("file:///a/b%20c")) == "/a/b c"


@pytest.mark.parametrize("scheme", ["http", "memory", "file", "path"])
def test_a_corpus_can_be_read_from_any_kind_of_url(scheme, server, corpus, tmp_path):
    directory, stream = corpus
    cache = tmp_path / "cache"
    url = {"http": lambda: add_to_server(server, directory) + "/", "memory": lambda: put_in_memory(directory)}.get(
        scheme, lambda: directory.as_uri() if scheme == "file" else str(directory)
    )()
    opened_corpus = open_corpus(url, cache)
    opened_corpus.check_shard_sizes()
    assert opened_corpus.manifest.compute_fingerprint() == CorpusManifest.load(directory).compute_fingerprint()
    assert (opened_corpus.directory / "tokenizer.json").read_bytes() == TOKENIZER
    if scheme in ("http", "memory"):
        assert [name.rsplit("/")[-1] for name in list_files(cache)] == ["manifest.json", "tokenizer.json", "url"]
    assert np.array_equal(opened_corpus.read(np.array([0, 15]), 20), [stream[:20], stream[15:35]])
    assert np.array_equal(opened_corpus.read(np.array([0]), len(stream))[0], stream)
    assert [opened_corpus.get_document_offsets(shard_index).tolist() for shard_index in range(3)] == [[0]] * 3
    if scheme in ("file", "path"):
        assert not cache.exists(), "local files were copied to the cache"


def test_shards_are_fetched_once_on_first_use(server, corpus, tmp_path):
    directory, _ = corpus
    cache = tmp_path / "cache"
    opened_corpus = open_corpus(add_to_server(server, directory), cache)
    assert server.requested_paths == ["/c/manifest.json", "/c/tokenizer.json"]
    opened_corpus.read(np.array([25]), 4)
    assert server.requested_paths[2:] == ["/c/train-00001.bin"]
    opened_corpus.read(np.array([25, 0]), 4)
    assert server.requested_paths[3:] == ["/c/train-00000.bin"]
    reopened = open_corpus(f"{server.url}/c", cache)
    reopened.read(np.array([0, 25]), 4)
    assert server.requested_paths[4:] == ["/c/manifest.json"], "a second run fetches more than the manifest"
    server.files["/c/manifest.json"] = server.files["/c/manifest.json"].replace(b"random", b"another")
    assert open_corpus(f"{server.url}/c", cache).directory != reopened.directory


def test_verify_hash_rejects_a_changed_remote_shard(server, corpus, tmp_path):
    data = DataConfig(
        path=add_to_server(server, corpus[0]),
        cache=str(tmp_path / "cache"),
        seq_len=4,
        global_batch=4,
        micro_batch=4,
        verify="hash",
    )
    opened_corpus = Corpus.from_config(data)
    (tmp_path / "cache" / "shards" / opened_corpus.shards[1].sha256).write_bytes(bytes(42))
    with pytest.raises(DataError, match=rf"{tmp_path}/cache/shards/.*: bytes 0 to 42 have sha256"):
        Corpus.from_config(data)


def test_a_local_manifest_may_name_remote_shards(server, corpus, tmp_path):
    """One shard is local, one on another host, and one has a header."""
    directory, stream = corpus
    add_to_server(server, directory)
    shards = list(CorpusManifest.load(directory).shards["train"])
    content = b"header" + (directory / "train-00002.bin").read_bytes()  # 6 bytes, and 22 tokens
    server.files["/elsewhere"] = content
    shards[1] = Shard(**{**vars(shards[1]), "file": f"{server.url}/c/train-00001.bin"})
    shards[2] = Shard(
        f"{server.url}/elsewhere",
        tokens=22,
        documents=1,
        text_bytes=22,
        sha256=compute_digest(content).removeprefix("sha256:"),
        skip_bytes=6,
        offsets="train-00002.offsets",
    )
    for name in ("train-00001.bin", "train-00001.offsets", "train-00002.bin"):
        (directory / name).unlink()
    CorpusManifest(
        "uint16", vocab_size=300, tokenizer_sha256="", source=(), shards={"train": tuple(shards), "heldout": ()}
    ).save(directory)
    opened_corpus = Corpus(directory, cache=str(tmp_path / "cache"))
    opened_corpus.check_shard_sizes()
    assert np.array_equal(opened_corpus.read(np.array([0]), len(stream))[0], stream)
    assert [opened_corpus.get_document_offsets(shard_index).tolist() for shard_index in range(3)] == [[0]] * 3


def test_a_remote_corpus_gives_the_same_batch(server, corpus, tmp_path):
    directory, _ = corpus
    batches = []
    for location in (str(directory), add_to_server(server, directory)):
        keys = {"path": location, "cache": str(tmp_path / "cache"), "seq_len": 4, "global_batch": 8, "micro_batch": 8}
        config = make_config(ranks=1, data=keys)
        vocabulary = ObjectiveVocabulary(num_tokenizer_ids=300, eot=256)
        loader = build_loader(config, build_fresh_plan(config), vocabulary, dp_rank=0, dp_size=1, pin=False)
        batches.append(loader.load_batches(0)[0].inputs_BS)
        loader.close()
    assert batches[0].equal(batches[1])
    assert sorted(path for path in server.requested_paths if path.endswith("bin")) == [
        f"/c/train-0000{n}.bin" for n in range(3)
    ]


@pytest.mark.parametrize("fault", ["busy", "cut", "damage"])
def test_transient_errors_are_retried(fault, server, tmp_path, retry_pauses):
    server.files["/x"] = content = os.urandom(1000)
    server.planned_faults = [fault, fault]
    target = fetch(
        f"{server.url}/x", tmp_path / "deep" / "x", expected_bytes=1000, expected_hash=compute_digest(content)
    )
    assert target.read_bytes() == content
    assert (len(server.requested_paths), retry_pauses) == (3, [1.0, 2.0])
    assert list_files(tmp_path) == ["deep/x"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("busy", "cannot be fetched in 4 tries: HTTP status 503"),
        ("cut", "in 4 tries: OSError: the connection ended 500 bytes early"),
        ("damage", "in 4 tries: received data with sha256:.*, but the manifest says"),
    ],
)
def test_persistent_errors_end_with_a_hint(fault, message, server, tmp_path, retry_pauses):
    server.files["/x"] = content = os.urandom(1000)
    server.planned_faults = [fault] * 99
    target = tmp_path / "x"
    with pytest.raises(DataError, match=rf"{server.url}/x: .*{message}.* copy the file by other means to {target}"):
        fetch(f"{server.url}/x", target, expected_bytes=1000, expected_hash=compute_digest(content))
    assert len(server.requested_paths) == 4
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("size", [999, 1001])
def test_a_wrong_size_is_rejected(size, server, tmp_path, retry_pauses):
    server.files["/x"] = bytes(1000)
    with pytest.raises(DataError, match=f"received 1000 bytes, but the manifest says {size}"):
        fetch(f"{server.url}/x", tmp_path / "x", expected_bytes=size, expected_hash=None)
    assert list_files(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{server}/none", "cannot be fetched: HTTP status 404"),
        ("memory://none", "cannot be fetched: FileNotFoundError"),
        ("nosuch://x/y", "cannot be fetched: ValueError: Protocol not known: nosuch"),
    ],
)
def test_permanent_errors_are_not_retried(url, message, server, tmp_path, retry_pauses):
    with pytest.raises(DataError, match=message):
        fetch(url.format(server=server.url), tmp_path / "x", expected_bytes=None, expected_hash=None)
    assert retry_pauses == []


def test_error_of_an_unreachable_corpus_names_the_local_mirror(server, corpus, tmp_path, retry_pauses):
    cache, url = tmp_path / "cache", add_to_server(server, corpus[0])
    mirrored_corpus = open_corpus(url, cache)
    mirrored_corpus.read(np.array([0]), 60)
    partial_mirror = Path(f"{mirrored_corpus.directory}.killed.partial")
    shutil.copytree(mirrored_corpus.directory, partial_mirror)
    os.utime(partial_mirror / "url", (2**32, 2**32))  # newer than the complete mirror
    server.close()
    with pytest.raises(
        DataError, match=rf"{url}/manifest.json: .* in 4 tries.* set data.path to .*: {mirrored_corpus.directory}$"
    ):
        open_corpus(url, cache)
    reopened = open_corpus(str(mirrored_corpus.directory), cache)
    assert np.array_equal(reopened.read(np.array([0]), 60), mirrored_corpus.read(np.array([0]), 60))
    with pytest.raises(DataError, match=r"manifest.json: .* copy the corpus to a disk and set data.path"):
        open_corpus(url, tmp_path / "empty")
    server.__init__()  # the fixture closes the server


def test_a_url_without_a_corpus_is_rejected(server, tmp_path):
    server.files["/c/manifest.json"] = b"{}"
    with pytest.raises(DataError, match=rf"{server.url}/c/manifest.json: not of format"):
        open_corpus(f"{server.url}/c", tmp_path)
    assert list_files(tmp_path) == []


def test_a_failed_mirror_leaves_no_files(server, corpus, tmp_path, retry_pauses):
    """The tokenizer is missing. The next run must not find an incomplete mirror."""
    url = add_to_server(server, corpus[0])
    tokenizer = server.files.pop("/c/tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be fetched: HTTP status 404"):
        open_corpus(url, tmp_path / "cache")
    assert list_files(tmp_path / "cache") == []
    server.files["/c/tokenizer.json"] = b"other"
    with pytest.raises(DataError, match=r"tokenizer.json: .* with sha256"):
        open_corpus(url, tmp_path / "cache")
    server.files["/c/tokenizer.json"] = tokenizer
    open_corpus(url, tmp_path / "cache")


def test_an_unwritable_cache_is_rejected(server, corpus, tmp_path):
    (tmp_path / "file").touch()
    url = add_to_server(server, corpus[0])
    with pytest.raises(DataError, match=r"cannot be written: Not a directory.* set data.cache to a directory"):
        open_corpus(url, tmp_path / "file")
    with pytest.raises(DataError, match=r"/file: cannot be written: File exists"):
        fetch(f"{url}/train-00000.bin", tmp_path / "file" / "x", expected_bytes=None, expected_hash=None)


def test_only_abandoned_partial_files_are_removed(server, tmp_path):
    server.files["/x"] = b"content"
    abandoned, recent = tmp_path / "x.1.partial", tmp_path / "x.2.partial"
    for path in (abandoned, recent):
        path.touch()
    os.utime(abandoned, (1, time.time() - remote.ABANDONED_SECONDS - 1))
    fetch(f"{server.url}/x", tmp_path / "x", expected_bytes=None, expected_hash=None)
    assert list_files(tmp_path) == ["x", "x.2.partial"]


@pytest.mark.parametrize("has_locks", [True, False])
def test_concurrent_fetches_give_complete_files(has_locks, server, tmp_path, monkeypatch):
    """With file locks, one thread downloads for all. Without them, each thread may download.

    In both cases no thread reads an incomplete file.
    """
    if not has_locks:

        def raise_os_error(*arguments):
            raise OSError("no locks here")

        monkeypatch.setattr(file_locks.fcntl, "flock", raise_os_error)
    server.files["/x"] = content = os.urandom(3_000_000)
    server.pause_seconds = 0.05
    target = tmp_path / "x"

    def fetch_and_compare(thread_index):
        path = fetch(f"{server.url}/x", target, expected_bytes=len(content), expected_hash=compute_digest(content))
        return path.read_bytes() == content

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(fetch_and_compare, range(16)))
    assert len(server.requested_paths) == 1 if has_locks else 1 <= len(server.requested_paths) <= 16
    assert list_files(tmp_path) == ["x"]


# Arguments: URL, cache, number of processes, prefix of the files to write.
READER_SCRIPT = """if True:
    import os, sys
    import numpy as np
    from dist_llm.config.data_sections import DataConfig
    from dist_llm.data.corpus import Corpus
    url, cache, num_processes, output_prefix = sys.argv[1:]
    for process_index in range(int(num_processes)):
        if os.fork() == 0:  # many processes with one interpreter start
            corpus = Corpus.from_config(DataConfig(path=url, cache=cache, seq_len=4, global_batch=4, micro_batch=4))
            corpus.check_shard_sizes()
            (tokens,) = corpus.read(np.array([0]), corpus.num_tokens)
            tokens.tofile(f"{output_prefix}{process_index}")
            os._exit(0)
    sys.exit(any(os.wait()[1] for _ in range(int(num_processes))))
"""


def start_readers(url, cache, output_prefix, num_processes=1):
    """Start processes that each read all tokens of the corpus and write them to a file."""
    command = [sys.executable, "-c", READER_SCRIPT, url, str(cache), str(num_processes), str(output_prefix)]
    return subprocess.Popen(command, start_new_session=True)


def test_sixteen_processes_share_one_cache(server, corpus, tmp_path):
    directory, stream = corpus
    server.pause_seconds = 0.1
    url, cache = add_to_server(server, directory), tmp_path / "cache"
    assert start_readers(url, cache, tmp_path / "result", num_processes=16).wait(timeout=120) == 0
    expected = stream.astype("<u2").tobytes()
    assert [(tmp_path / f"result{index}").read_bytes() == expected for index in range(16)] == [True] * 16
    assert server.requested_paths.count("/c/train-00000.bin") == 1, "several processes fetched the shard"
    assert len(list_files(cache)) == 3 + 3, list_files(
        cache
    )  # three files of the mirror, three shards, no lock and no partial file


def test_a_killed_download_leaves_no_complete_file(server, corpus, tmp_path):
    directory, stream = corpus
    url, cache = add_to_server(server, directory), tmp_path / "cache"
    shards = cache / "shards"
    open_corpus(url, cache)
    server.pause_seconds = 60
    killed_process, waiting_process = start_readers(url, cache, tmp_path / "killed"), None
    try:
        assert server.shard_requested.wait(60)
        assert list(shards.glob("*.partial")), "no download has begun"
        waiting_process = start_readers(url, cache, tmp_path / "waiting")
        server.pause_seconds = 0
    finally:
        os.killpg(killed_process.pid, signal.SIGKILL)
        killed_process.wait()
    assert waiting_process.wait(timeout=60) == 0, "the second process did not get the lock of the killed process"
    assert (tmp_path / "waiting0").read_bytes() == stream.astype("<u2").tobytes()
    assert not (tmp_path / "killed0").exists()
    complete = {name for name in list_files(shards) if "." not in name}
    assert complete == {shard.sha256 for shard in CorpusManifest.load(directory).shards["train"]}
    assert not list(shards.glob("*.lock"))


def test_localize_corpus_returns_a_local_path(tmp_path):
    assert localize_corpus(str(tmp_path), "nowhere") == tmp_path
    assert localize_corpus(tmp_path.as_uri(), "nowhere") == tmp_path
