"""Megatron's .bin and .idx files, with and without end tokens, train exactly as the same corpus from our own writer."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import CorpusManifest, ShardWriter, Split
from dist_llm.launch.world import World
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.training.evaluate_checkpoint import EvaluationOptions, evaluate_checkpoint
from dist_llm.training.run import train
from dist_llm.training.settings import read_config
from tests.cli_runner import make_cli_runner
from tests.text.test_token_files import build_megatron_index

EOT = 256
SPLITS: dict[Split, int] = {"train": 60, "heldout": 12}  # number of documents


def make_documents(split: Split, end_tokens: bool) -> list[np.ndarray]:
    """Return random documents of a split as token ids, with or without the token at their end."""
    rng = np.random.default_rng(len(split))
    documents = [rng.integers(97, 123, rng.integers(5, 40)) for _ in range(SPLITS[split])]
    return [np.append(ids, EOT) for ids in documents] if end_tokens else documents


def write_megatron_corpus(directory: Path, end_tokens: bool) -> Path:
    """Write files as Megatron's preprocess_data.py does, with --append-eod or without, and adopt them."""
    for split in SPLITS:
        documents = make_documents(split, end_tokens)
        np.concatenate(documents).astype("<u2").tofile(directory / f"{split}.bin")
        bounds = range(len(documents) + 1)
        (directory / f"{split}.idx").write_bytes(
            build_megatron_index([len(document) for document in documents], bounds)
        )
    options = AdoptOptions(
        format="megatron",
        data=(str(directory / "train.bin"),),
        tokenizer="byte",
        out=directory / "adopted",
        heldout=(str(directory / "heldout"),),
    )
    adopt(options, io.StringIO())
    return options.out


def write_native_corpus(directory: Path, end_tokens: bool) -> Path:
    """Write the same tokens and documents with our own writer."""
    out = directory / "ours"
    out.mkdir()
    shards = {}
    for split in SPLITS:
        with ShardWriter(out, split, "uint16", max_tokens=500) as writer:
            for ids in make_documents(split, end_tokens):
                writer.add(ids, len(ids) - end_tokens)
            shards[split] = writer.close()
    tokenizer = build_tokenizer("byte")
    tokenizer.save(out)
    CorpusManifest("uint16", vocab_size=257, tokenizer_sha256=tokenizer.sha256, source=("x",), shards=shards).save(out)
    return out


def read_losses(run: Path, name: str) -> list[float]:
    """Return the values of one metric in metrics.jsonl of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("end_tokens", [True, False])
def test_megatron_files_train_like_our_own_corpus(
    end_tokens: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora = {
        "megatron": write_megatron_corpus(tmp_path, end_tokens),
        "native": write_native_corpus(tmp_path, end_tokens),
    }
    for split in SPLITS:
        documents = make_documents(split, end_tokens)
        corpus = Corpus(corpora["megatron"], split)
        row = corpus.compute_document_ids(np.array([0]), corpus.num_tokens)[0]
        expected = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
        assert np.array_equal(row, expected), "document ids do not change where documents start"
        assert corpus.read(np.array([0]), corpus.num_tokens)[0].tolist() == np.concatenate(documents).tolist()
    inspect = make_cli_runner("data")
    assert inspect("verify", *corpora.values()) == int(not end_tokens), (
        "the result is wrong for our corpus, which needs end tokens to verify"
    )
    assert inspect("verify", corpora["megatron"]) == 0

    config = tmp_path / "config.yaml"
    config.write_text(
        "run: {steps: 6}\nmodel: {d_model: 16, n_layers: 1, n_heads: 2}\noptim: {lr: 0.01}\n"
        "data: {seq_len: 32, global_batch: 8, prefetch: 0, document_mask: true}\n"
        "log: {every: 1, tensorboard: false, peak_tflops: 1.0}\ncheckpoint: {keep: 1}\n"
    )
    for name, corpus in corpora.items():
        keys = [f"run.dir={tmp_path / 'runs' / name}", f"data.path={corpus}"]
        assert train(read_config(config, keys, world_size=1), World()) == 0
    for name in ("loss", "heldout_loss"):
        megatron_losses, native_losses = (read_losses(tmp_path / "runs" / run_name, name) for run_name in corpora)
        assert megatron_losses == native_losses, name
        assert len(megatron_losses) == (6 if name == "loss" else 1)

    # Both corpora give the same loss, which includes the document mask.
    run = str(tmp_path / "runs" / "megatron")
    masked = [
        evaluate_checkpoint(run, data=str(corpus), split="heldout", options=EvaluationOptions(), world=World()).loss
        for corpus in corpora.values()
    ]
    assert (
        masked[0]
        == masked[1]
        == pytest.approx(read_losses(tmp_path / "runs" / "megatron", "heldout_loss")[0], rel=1e-6)
    )

    windows = (Corpus(corpora["megatron"]).num_tokens - 1) // 32
    note = f"data: {corpora['megatron']} has been read once in full, up to sample {windows};"
    assert (tmp_path / "runs" / "megatron" / "logs" / "rank_00000.log").read_text().count(note) == 1
    keys = [f"run.dir={tmp_path / 'runs' / 'megatron'}", f"data.path={corpora['megatron']}"]
    assert train(read_config(config, keys, world_size=1), World()) == 0
    log = (tmp_path / "runs" / "megatron" / "logs" / "rank_00000.log").read_text()
    assert "nothing to do: the run has taken 6 steps, and run.steps is 6; raise it to continue" in log
    assert log.count(note) == 1, "the note must be logged only once"
