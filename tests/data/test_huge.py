"""A corpus of a trillion tokens starts and trains within fixed limits of time and memory.

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
from dist_llm.data.shard import CorpusManifest, Shard

NUM_SHARDS, SHARD_TOKENS = 1000, 10**9

# Argument: the directory of the corpus. Prints measured seconds and MiB as JSON.
MEASURE_SCRIPT = """if True:
    import json, sys, time
    from pathlib import Path
    from dist_llm.data.data_history import build_fresh_plan
    from dist_llm.data.loader import build_loader
    from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
    from dist_llm.config.derive import resolve_config
    from dist_llm.config.schema import UnresolvedConfig

    def read_memory_mb(name):
        (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
        return int(line.split()[1]) / 1024

    measured = {"imported_mb": read_memory_mb("VmRSS")}
    for order_name in ("shuffle", "random"):
        keys = dict(seq_len=2048, global_batch=512, micro_batch=8, order=order_name, prefetch=0)
        sections = dict(run=dict(dir="", steps=1), model=dict(d_model=8, n_layers=1, n_heads=1))
        unresolved = UnresolvedConfig.model_validate(sections | dict(data=dict(path=sys.argv[1], **keys)))
        config = resolve_config(unresolved, world_size=64, tokenizer_size=300)
        start_time = time.process_time()
        plan = build_fresh_plan(config)
        loader = build_loader(config, plan, ObjectiveVocabulary(300, 256), dp_rank=0, dp_size=64, pin=False)
        assert loader.load_batches(0)[0].num_valid_tokens == 8 * 2048
        measured[f"{order_name}_start_seconds"] = time.process_time() - start_time
        start_time = time.process_time()
        _, starts = plan.locate_samples(loader.get_local_samples(10**6 * 512))
        measured[f"{order_name}_locate_seconds"] = time.process_time() - start_time
        assert len(set(starts.tolist())) == 8 and starts.max() > 10**11
        for step in range(50):  # 400 windows in about as many shards: more shards than stay mapped
            loader.load_batches((10**6 + step) * 512)
    measured["peak_mb"] = read_memory_mb("VmHWM")
    print(json.dumps(measured))
"""


@pytest.fixture(scope="module")
def trillion_token_corpus(tmp_path_factory):
    """Write a thousand sparse shards of a billion tokens each: 2 TB that use no disk space."""
    directory = tmp_path_factory.mktemp("trillion")
    shards = []
    for shard_index in range(NUM_SHARDS):
        name = f"train-{shard_index:05d}.bin"
        with (directory / name).open("wb") as file:
            file.truncate(2 * SHARD_TOKENS)  # 2 bytes per token of uint16
        shards.append(Shard(name, SHARD_TOKENS, documents=1_000_000, text_bytes=4 * SHARD_TOKENS, sha256="0" * 64))
    CorpusManifest(
        "uint16", vocab_size=50257, tokenizer_sha256="", source=(), shards={"train": tuple(shards), "heldout": ()}
    ).save(directory)
    return directory


def test_a_trillion_tokens_start_in_two_seconds_and_300_mb(trillion_token_corpus):
    completed = subprocess.run(
        [sys.executable, "-c", MEASURE_SCRIPT, trillion_token_corpus], capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    measured = json.loads(completed.stdout)
    for order in ("shuffle", "random"):
        assert measured[f"{order}_start_seconds"] < 2, measured
        assert measured[f"{order}_locate_seconds"] < 0.01, measured
    assert measured["peak_mb"] - measured["imported_mb"] < 60, measured
    assert measured["peak_mb"] < 300, measured


def test_read_maps_more_shards_than_the_file_limit(trillion_token_corpus):
    """Each mapped shard holds a file descriptor, and a shuffle reads all shards.

    The limit of open files may be lower than the number of shards.
    """
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    corpus = Corpus(trillion_token_corpus)
    starts = np.arange(NUM_SHARDS) * SHARD_TOKENS
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(700, hard_limit), hard_limit))
    try:
        assert not corpus.read(starts, 8).any()
        assert not corpus.read(starts[::-1], 8).any()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft_limit, hard_limit))
    assert len(corpus._mapped_shards) == corpus_module.MAX_MAPPED_SHARDS


def test_read_crosses_a_shard_boundary_at_a_large_offset(trillion_token_corpus):
    corpus = Corpus(trillion_token_corpus)
    with (trillion_token_corpus / "train-00998.bin").open("r+b") as file:
        file.seek(2 * (SHARD_TOKENS - 2))
        file.write(np.array([7, 8], "<u2").tobytes())
    with (trillion_token_corpus / "train-00999.bin").open("r+b") as file:
        file.write(np.array([9, 10], "<u2").tobytes())
    assert corpus.read(np.array([999 * SHARD_TOKENS - 3]), 6).tolist() == [[0, 7, 8, 9, 10, 0]]
    assert corpus.count_windows(2049, 2048) == (10**12 - 1) // 2048


def test_a_manifest_of_many_shards_loads_fast(tmp_path):
    shards = tuple(
        Shard(f"train-{index:05d}.bin", tokens=10**8, documents=10**5, text_bytes=4 * 10**8, sha256="0" * 64)
        for index in range(20_000)
    )
    CorpusManifest(
        "uint16", vocab_size=50257, tokenizer_sha256="", source=(), shards={"train": shards, "heldout": ()}
    ).save(tmp_path)
    start_time = time.process_time()
    assert CorpusManifest.load(tmp_path).count_tokens("train") == 20_000 * 10**8
    assert time.process_time() - start_time < 2
