"""An interrupted shard writer resumes to the same bytes, and rejects files that have changed."""

import random

import numpy as np
import pytest

from dist_llm.data.shard import ShardWriter
from dist_llm.errors import DataError
from dist_llm.io.resumable_file import FileState, ResumableFile, hash_prefix


def write_randomly(directory, documents, cut_probability, seed=0):
    """Write all documents in batches of random size; at each cut, a new writer restores the last sync."""
    rng = random.Random(seed)
    writer, states, num_written = ShardWriter(directory, "train", "uint16", max_tokens=20), {}, 0
    while num_written < len(documents):
        batch = documents[num_written : num_written + rng.randint(1, 9)]
        writer.extend(np.concatenate(batch), np.cumsum([len(document) for document in batch]), np.full(len(batch), 3))
        if rng.random() < cut_probability:
            states |= {state.shard.file: state for state in writer.sync()}
            if rng.random() < 0.5:
                writer.add(np.full(7, 9), 1)  # written, but not synced
            writer.__exit__()
            writer = ShardWriter(directory, "train", "uint16", max_tokens=20)
            writer.restore(list(states.values()))
        num_written += len(batch)
    return writer.close()


@pytest.mark.parametrize("seed", range(5))
def test_resumed_writer_writes_the_same_bytes(seed, tmp_path):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 1000, size).astype(np.uint16) for size in rng.integers(1, 30, 200)]
    one_by_one, cut = tmp_path / "one", tmp_path / "cut"
    for directory in (one_by_one, cut):
        directory.mkdir()
    writer = ShardWriter(one_by_one, "train", "uint16", max_tokens=20)
    for document in documents:
        writer.add(document, 3)
    expected = writer.close()
    assert write_randomly(cut, documents, cut_probability=0.3, seed=seed) == expected
    for shard in expected:
        for name in (shard.file, shard.file.replace(".bin", ".offsets")):
            assert (cut / name).read_bytes() == (one_by_one / name).read_bytes()
    assert all(shard.tokens <= 20 or shard.documents == 1 for shard in expected)


def test_reopen_drops_the_bytes_after_the_state(tmp_path):
    file = ResumableFile(tmp_path / "f")
    file.write(b"kept")
    state = file.sync()
    file.write(b"lost")
    file.close()
    reopened = ResumableFile.reopen(tmp_path / "f", state)
    reopened.write(b"!")
    assert reopened.close() == FileState(5, reopened.state.sha256)
    assert (tmp_path / "f").read_bytes() == b"kept!"
    hash_prefix(tmp_path / "f", reopened.state)


@pytest.mark.parametrize("content", [b"kepT and more", b"kep", None])
def test_reopen_rejects_a_changed_file(content, tmp_path):
    file = ResumableFile(tmp_path / "f")
    file.write(b"kept")
    state = file.close()
    (tmp_path / "f").unlink() if content is None else (tmp_path / "f").write_bytes(content)
    with pytest.raises(DataError, match="/f: "):
        ResumableFile.reopen(tmp_path / "f", state)
