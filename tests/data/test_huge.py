"""Start-up time, step time and memory do not depend on the corpus size, tested with a trillion tokens.

Times are CPU times, because wall times vary on a shared machine.
"""

import json
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from dist_llm.data import corpus as corpus_module
from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import Manifest, Shard

SHARDS, SHARD_TOKENS = 1000, 10**9

CODE = """if True:
    import json, sys, time
    from pathlib import Path
    from dist_llm.data.data_history import build_fresh_plan
    from dist_llm.data.loader import build_loader
    from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
    from dist_llm.config.derive import resolve_config
    from dist_llm.config.schema import Config

    def memory(name):
        (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
        return int(line.split()[1]) / 1024

    found = {"imported_mb": memory("VmRSS")}
    for order_name in ("shuffle", "random"):
        keys = dict(seq_len=2048, global_batch=512, micro_batch=8, order=order_name, prefetch=0)
        raw = dict(run=dict(dir="", steps=1), model=dict(d_model=8, n_layers=1, n_heads=1))
        unresolved = UnresolvedConfig.model_validate(raw | dict(data=dict(path=sys.argv[1], **keys)))
        config = resolve_config(unresolved, 64, 300)
        begin = time.process_time()
        plan = build_fresh_plan(config)
        loader = build_loader(config, plan, ObjectiveVocabulary(300, 256), 0, 64, pin=False)
        assert loader.load_batches(0)[0].num_valid_tokens == 8 * 2048
        found[f"{order_name}_start_seconds"] = time.process_time() - begin
        begin = time.process_time()
        _, starts = plan.locate_samples(loader.get_local_samples(10**6 * 512))
        found[f"{order_name}_find_seconds"] = time.process_time() - begin
        assert len(set(starts.tolist())) == 8 and starts.max() > 10**11
        for step in range(50):  # 400 windows in about as many shards: more than stay open
            loader.load_batches((10**6 + step) * 512)
    found["peak_mb"] = memory("VmHWM")
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trillion_tokens(tmp_path_factory):
    """A thousand sparse files of a billion tokens each: 2 TB that use no disk space."""
    directory = tmp_path_factory.mktemp("trillion")
    shards = []
    for number in range(SHARDS):
        name = f"train-{number:05d}.bin"
        with (directory / name).open("wb") as file:
            file.truncate(2 * SHARD_TOKENS)
        shards.append(Shard(name, SHARD_TOKENS, 1_000_000, 4 * SHARD_TOKENS, "0" * 64))
    Manifest("uint16", 50257, "", (), {"train": tuple(shards), "heldout": ()}).save(directory)
    return directory


def test_a_trillion_tokens_start_in_two_seconds_and_300_mb(trillion_tokens):
    completed = subprocess.run(
        [sys.executable, "-c", CODE, trillion_tokens], capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    measured = json.loads(completed.stdout)
    for order in ("shuffle", "random"):
        assert measured[f"{order}_start_seconds"] < 2, measured
        assert measured[f"{order}_find_seconds"] < 0.01, measured
    assert measured["peak_mb"] - measured["imported_mb"] < 60, measured
    assert measured["peak_mb"] < 300, measured


def test_read_maps_more_shards_than_the_file_limit(trillion_tokens):
    """A mapping holds a file descriptor and a shuffle reads all shards: the usual limit of 1024 must suffice."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    corpus = Corpus(trillion_tokens)
    starts = np.arange(SHARDS) * SHARD_TOKENS
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(700, limits[1]), limits[1]))
    try:
        assert not corpus.read(starts, 8).any()
        assert not corpus.read(starts[::-1], 8).any()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(corpus._mapped_shards) == corpus_module.MAX_MAPPED_SHARDS


def test_read_crosses_a_shard_boundary_at_a_large_offset(trillion_tokens):
    corpus = Corpus(trillion_tokens)
    with (trillion_tokens / "train-00998.bin").open("r+b") as file:
        file.seek(2 * (SHARD_TOKENS - 2))
        file.write(np.array([7, 8], "<u2").tobytes())
    with (trillion_tokens / "train-00999.bin").open("r+b") as file:
        file.write(np.array([9, 10], "<u2").tobytes())
    assert corpus.read(np.array([999 * SHARD_TOKENS - 3]), 6).tolist() == [[0, 7, 8, 9, 10, 0]]
    assert corpus.count_windows(2049, 2048) == (10**12 - 1) // 2048


def test_a_manifest_of_many_shards_loads_fast(tmp_path):
    shards = tuple(Shard(f"train-{n:05d}.bin", 10**8, 10**5, 4 * 10**8, "0" * 64) for n in range(20_000))
    Manifest("uint16", 50257, "", (), {"train": shards, "heldout": ()}).save(tmp_path)
    start_time = time.process_time()
    assert Manifest.load(tmp_path).count_tokens("train") == 20_000 * 10**8
    assert time.process_time() - start_time < 2
