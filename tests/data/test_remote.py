"""What is far away comes whole or not at all, once, however many ask for it and however they die."""

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

from dist_llm.config.schema import DataConfig
from dist_llm.data import remote
from dist_llm.data.corpus import Corpus
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import build_loader
from dist_llm.data.mirror import localize_corpus
from dist_llm.data.remote import as_path, fetch, is_remote
from dist_llm.data.shard import Manifest, Shard, ShardWriter
from dist_llm.errors import DataError
from dist_llm.objectives.objective_vocabulary import Vocabulary
from tests.laws.law import config_of

TOKENIZER = b'{"some": "tokenizer"}'


class Far:
    """An HTTP server of files in memory. `asked`: the paths in order; `script`: what goes wrong with each answer."""

    def __init__(self):
        self.files, self.asked, self.script = {}, [], []
        self.pause, self.held, self.closing = 0.0, threading.Event(), threading.Event()  # seconds amid a shard
        far = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                far.asked.append(self.path)
                content, trick = far.files.get(self.path), far.script.pop(0) if far.script else ""
                status = 404 if content is None else 503 if trick == "busy" else 200
                self.send_response(status)
                content = content if status == 200 else b""
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if trick == "damage":
                    content = b"?" + content[1:]
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if not self.path.endswith(".json"):
                    pause = far.pause
                    far.held.set()
                    far.closing.wait(pause)
                if trick != "cut":
                    with suppress(ConnectionError):  # who asked was killed
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
def far():
    server = Far()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch):
    """No test waits for a retry; what it would have waited."""
    waited = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


@pytest.fixture
def corpus(tmp_path):
    """A corpus of three shards on the disk, and its stream."""
    directory = tmp_path / "here"
    directory.mkdir()
    documents = [np.random.default_rng(seed).integers(0, 300, 20 + seed) for seed in range(3)]
    writer = ShardWriter(directory, "train", "uint16", max_tokens=1)
    for document in documents:
        writer.add(document, text_bytes=len(document))
    digest = hashlib.sha256(TOKENIZER).hexdigest()
    Manifest("uint16", 300, digest, ("random",), {"train": writer.close(), "heldout": ()}).save(directory)
    (directory / "tokenizer.json").write_bytes(TOKENIZER)
    return directory, np.concatenate(documents)


def serve(far, directory):
    far.files.update({f"/c/{path.name}": path.read_bytes() for path in directory.iterdir()})
    return f"{far.url}/c"


def remember(directory):
    """The corpus under a memory: URL."""
    fsspec.filesystem("memory").put(str(directory) + "/", "/c/", recursive=True)
    return "memory://c"


def opened(url, cache, split="train"):
    return Corpus.from_config(DataConfig(path=url, cache=str(cache), seq_len=4, global_batch=4), split)


def digest(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_what_is_remote():
    assert [is_remote(each) for each in ("http://a/b", "s3://a", "memory://c", "hf://datasets/x")] == [True] * 4
    assert [is_remote(each) for each in ("a/b", "/a/b", "file:///a/b", "C:/a", "./a://b")] == [False] * 5
    assert str(as_path("file:///a/b%20c")) == "/a/b c"


@pytest.mark.parametrize("scheme", ["http", "memory", "file", "path"])
def test_a_corpus_is_the_same_from_anywhere(scheme, far, corpus, tmp_path):
    directory, stream = corpus
    cache = tmp_path / "cache"
    url = {"http": lambda: serve(far, directory) + "/", "memory": lambda: remember(directory)}.get(
        scheme, lambda: directory.as_uri() if scheme == "file" else str(directory)
    )()
    found = opened(url, cache)
    found.check_shard_sizes()
    assert found.manifest.fingerprint() == Manifest.load(directory).fingerprint()
    assert (found.directory / "tokenizer.json").read_bytes() == TOKENIZER
    if scheme in ("http", "memory"):
        assert [name.rsplit("/")[-1] for name in names(cache)] == ["manifest.json", "tokenizer.json", "url"]
    assert np.array_equal(found.read(np.array([0, 15]), 20), [stream[:20], stream[15:35]])
    assert np.array_equal(found.read(np.array([0]), len(stream))[0], stream)
    assert [found.document_offsets(number).tolist() for number in range(3)] == [[0]] * 3
    if scheme in ("file", "path"):
        assert not cache.exists(), "what is here is not copied"


def test_shards_come_on_first_use_and_once(far, corpus, tmp_path):
    directory, _ = corpus
    cache = tmp_path / "cache"
    found = opened(serve(far, directory), cache)
    assert far.asked == ["/c/manifest.json", "/c/tokenizer.json"]
    found.read(np.array([25]), 4)
    assert far.asked[2:] == ["/c/train-00001.bin"]
    found.read(np.array([25, 0]), 4)
    assert far.asked[3:] == ["/c/train-00000.bin"]
    again = opened(f"{far.url}/c", cache)
    again.read(np.array([0, 25]), 4)
    assert far.asked[4:] == ["/c/manifest.json"], "a second run asks whether the corpus is still the same, no more"
    far.files["/c/manifest.json"] = far.files["/c/manifest.json"].replace(b"random", b"another")
    assert opened(f"{far.url}/c", cache).directory != again.directory


def test_hashes_are_checked_on_demand_there_too(far, corpus, tmp_path):
    data = DataConfig(
        path=serve(far, corpus[0]), cache=str(tmp_path / "cache"), seq_len=4, global_batch=4, verify="hash"
    )
    found = Corpus.from_config(data)
    (tmp_path / "cache" / "shards" / found.shards[1].sha256).write_bytes(bytes(42))
    with pytest.raises(DataError, match=rf"{tmp_path}/cache/shards/.*: bytes 0 to 42 have sha256"):
        Corpus.from_config(data)


def test_a_local_manifest_may_point_far_away(far, corpus, tmp_path):
    """One shard here, one at another host's, and a header before the third."""
    directory, stream = corpus
    serve(far, directory)
    shards = list(Manifest.load(directory).shards["train"])
    content = b"header" + (directory / "train-00002.bin").read_bytes()
    far.files["/elsewhere"] = content
    shards[1] = Shard(**{**vars(shards[1]), "file": f"{far.url}/c/train-00001.bin"})
    shards[2] = Shard(
        f"{far.url}/elsewhere", 22, 1, 22, digest(content).removeprefix("sha256:"), 6, "train-00002.offsets"
    )
    for gone in ("train-00001.bin", "train-00001.offsets", "train-00002.bin"):
        (directory / gone).unlink()
    Manifest("uint16", 300, "", (), {"train": tuple(shards), "heldout": ()}).save(directory)
    found = Corpus(directory, cache=str(tmp_path / "cache"))
    found.check_shard_sizes()
    assert np.array_equal(found.read(np.array([0]), len(stream))[0], stream)
    assert [found.document_offsets(number).tolist() for number in range(3)] == [[0]] * 3


def test_a_batch_is_the_same_from_far_away(far, corpus, tmp_path):
    directory, _ = corpus
    batches = []
    for place in (str(directory), serve(far, directory)):
        keys = {"path": place, "cache": str(tmp_path / "cache"), "seq_len": 4, "global_batch": 8, "micro_batch": 8}
        config = config_of(1, {}, data=keys)
        loader = build_loader(config, build_fresh_plan(config), Vocabulary(300, 256), 0, 1, pin=False)
        batches.append(loader.load_batches(0)[0].inputs_BS)
        loader.close()
    assert batches[0].equal(batches[1])
    assert sorted(path for path in far.asked if path.endswith("bin")) == [f"/c/train-0000{n}.bin" for n in range(3)]


@pytest.mark.parametrize("trick", ["busy", "cut", "damage"])
def test_a_passing_trouble_is_tried_again(trick, far, tmp_path, waits):
    far.files["/x"] = content = os.urandom(1000)
    far.script = [trick, trick]
    target = fetch(f"{far.url}/x", tmp_path / "deep" / "x", 1000, digest(content))
    assert target.read_bytes() == content
    assert (len(far.asked), waits) == (3, [1.0, 2.0])
    assert names(tmp_path) == ["deep/x"]


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        ("busy", "cannot be fetched in 4 tries: HTTP status 503"),
        ("cut", "in 4 tries: OSError: the connection ended 500 bytes early"),
        ("damage", "in 4 tries: received data with sha256:.*, but the manifest promises"),
    ],
)
def test_a_lasting_trouble_ends_with_the_way_out(trick, message, far, tmp_path, waits):
    far.files["/x"] = content = os.urandom(1000)
    far.script = [trick] * 99
    target = tmp_path / "x"
    with pytest.raises(DataError, match=rf"{far.url}/x: .*{message}.* copy the file by other means to {target}"):
        fetch(f"{far.url}/x", target, 1000, digest(content))
    assert len(far.asked) == 4
    assert names(tmp_path) == []


@pytest.mark.parametrize("size", [999, 1001])
def test_another_size_is_refused(size, far, tmp_path, waits):
    far.files["/x"] = bytes(1000)
    with pytest.raises(DataError, match=f"received 1000 bytes, but the manifest promises {size}"):
        fetch(f"{far.url}/x", tmp_path / "x", size, None)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{far}/none", "cannot be fetched: HTTP status 404"),
        ("memory://none", "cannot be fetched: FileNotFoundError"),
        ("nosuch://x/y", "cannot be fetched: ValueError: Protocol not known: nosuch"),
    ],
)
def test_a_hopeless_trouble_is_not_tried_again(url, message, far, tmp_path, waits):
    with pytest.raises(DataError, match=message):
        fetch(url.format(far=far.url), tmp_path / "x", None, None)
    assert waits == []


def test_a_corpus_out_of_reach_names_the_mirror_that_is_here(far, corpus, tmp_path, waits):
    cache, url = tmp_path / "cache", serve(far, corpus[0])
    before = opened(url, cache)
    before.read(np.array([0]), 60)
    shutil.copytree(before.directory, killed := Path(f"{before.directory}.killed.partial"))
    os.utime(killed / "url", (2**32, 2**32))  # newer, but not to be trusted
    far.close()
    with pytest.raises(
        DataError, match=rf"{url}/manifest.json: .* in 4 tries.* set data.path to .*: {before.directory}$"
    ):
        opened(url, cache)
    assert np.array_equal(opened(str(before.directory), cache).read(np.array([0]), 60), before.read(np.array([0]), 60))
    with pytest.raises(DataError, match=r"manifest.json: .* copy the corpus to a disk and set data.path"):
        opened(url, tmp_path / "empty")
    far.__init__()  # for the fixture to close


def test_a_url_that_is_no_corpus(far, tmp_path):
    far.files["/c/manifest.json"] = b"{}"
    with pytest.raises(DataError, match=rf"{far.url}/c/manifest.json: not of format"):
        opened(f"{far.url}/c", tmp_path)
    assert names(tmp_path) == []


def test_a_mirror_is_whole_or_not_there(far, corpus, tmp_path, waits):
    """The tokenizer does not come: nothing is left that a next run would take for the corpus."""
    url = serve(far, corpus[0])
    tokenizer = far.files.pop("/c/tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be fetched: HTTP status 404"):
        opened(url, tmp_path / "cache")
    assert names(tmp_path / "cache") == []
    far.files["/c/tokenizer.json"] = b"other"
    with pytest.raises(DataError, match=r"tokenizer.json: .* has sha256"):
        opened(url, tmp_path / "cache")
    far.files["/c/tokenizer.json"] = tokenizer
    opened(url, tmp_path / "cache")


def test_a_cache_that_cannot_be_written(far, corpus, tmp_path):
    (tmp_path / "file").touch()
    url = serve(far, corpus[0])
    with pytest.raises(DataError, match=r"cannot be written: Not a directory.* set data.cache to a directory"):
        opened(url, tmp_path / "file")
    with pytest.raises(DataError, match=r"/file: cannot be written: File exists"):
        fetch(f"{url}/train-00000.bin", tmp_path / "file" / "x", None, None)


def test_a_partial_file_of_the_dead_is_cleared_and_one_of_the_living_is_not(far, tmp_path):
    far.files["/x"] = b"content"
    old, young = tmp_path / "x.1.partial", tmp_path / "x.2.partial"
    for path in (old, young):
        path.touch()
    os.utime(old, (1, time.time() - remote.ABANDONED_SECONDS - 1))
    fetch(f"{far.url}/x", tmp_path / "x", None, None)
    assert names(tmp_path) == ["x", "x.2.partial"]


@pytest.mark.parametrize("locks", [True, False])
def test_threads_that_ask_at_once(locks, far, tmp_path, monkeypatch):
    """With locks one download serves all; on a file system without them each has its own, and none a torn one."""
    if not locks:

        def refuse(*arguments):
            raise OSError("no locks here")

        monkeypatch.setattr(remote.fcntl, "flock", refuse)
    far.files["/x"] = content = os.urandom(3_000_000)
    far.pause = 0.05
    target = tmp_path / "x"

    def ask(number):
        return fetch(f"{far.url}/x", target, len(content), digest(content)).read_bytes() == content

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(16)))
    assert len(far.asked) == 1 if locks else 1 <= len(far.asked) <= 16
    assert names(tmp_path) == ["x"]


READER = """if True:
    import os, sys
    import numpy as np
    from dist_llm.config.schema import DataConfig
    from dist_llm.data.corpus import Corpus
    url, cache, processes, result = sys.argv[1:]
    for number in range(int(processes)):
        if os.fork() == 0:  # many processes for the price of one start
            corpus = Corpus.from_config(DataConfig(path=url, cache=cache, seq_len=4, global_batch=4))
            corpus.check_sizes()
            (row,) = corpus.read(np.array([0]), corpus.n_tokens)
            row.tofile(f"{result}{number}")
            os._exit(0)
    sys.exit(any(os.wait()[1] for _ in range(int(processes))))
"""


def readers(url, cache, result, count=1):
    """`count` processes that read the corpus as one row, each into a file."""
    command = [sys.executable, "-c", READER, url, str(cache), str(count), str(result)]
    return subprocess.Popen(command, start_new_session=True)


def test_sixteen_processes_on_one_cache(far, corpus, tmp_path):
    directory, stream = corpus
    far.pause = 0.1
    url, cache = serve(far, directory), tmp_path / "cache"
    assert readers(url, cache, tmp_path / "result", 16).wait(timeout=120) == 0
    want = stream.astype("<u2").tobytes()
    assert [(tmp_path / f"result{number}").read_bytes() == want for number in range(16)] == [True] * 16
    assert far.asked.count("/c/train-00000.bin") == 1, "one fetched it for all"
    assert len(names(cache)) == 3 + 3, names(cache)  # the mirror and the shards: no lock, nothing partial


def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(far, corpus, tmp_path):
    directory, stream = corpus
    url, cache = serve(far, directory), tmp_path / "cache"
    shards = cache / "shards"
    opened(url, cache)
    far.pause = 60
    doomed, waiting = readers(url, cache, tmp_path / "doomed"), None
    try:
        assert far.held.wait(60)
        assert list(shards.glob("*.partial")), "a download has begun"
        waiting = readers(url, cache, tmp_path / "waiting")
        far.pause = 0
    finally:
        os.killpg(doomed.pid, signal.SIGKILL)
        doomed.wait()
    assert waiting.wait(timeout=60) == 0, "it got the lock"
    assert (tmp_path / "waiting0").read_bytes() == stream.astype("<u2").tobytes()
    assert not (tmp_path / "doomed0").exists()
    whole = {name for name in names(shards) if "." not in name}
    assert whole == {shard.sha256 for shard in Manifest.load(directory).shards["train"]}
    assert not list(shards.glob("*.lock"))


def test_localize_leaves_a_local_path_alone(tmp_path):
    assert localize_corpus(str(tmp_path), "nowhere") == tmp_path
    assert localize_corpus(tmp_path.as_uri(), "nowhere") == tmp_path
