"""Write and read tiny corpora, and token files of other tools."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.data.corpus import Corpus
from dist_llm.data.packed_windows import PackedWindows
from dist_llm.data.shard import SPLITS, CorpusManifest, ShardWriter
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.tokenizer import ENDOFTEXT
from tests.text.megatron_index import build_megatron_index

BYTE_TOKENIZER = BPETokenizer("byte", SPLIT_PATTERNS["gpt2"], {bytes([i]): i for i in range(256)}, {ENDOFTEXT: 256})


def write_corpus(directory: Path, has_prompts: bool = False) -> None:
    """Write a corpus of five documents in each split, with or without prompts."""
    shards = {}
    for split in SPLITS:
        with ShardWriter(directory, split, "uint16", max_tokens=60, has_prompts=has_prompts) as writer:
            for length in (20, 5, 30, 17, 40):
                ids = np.append(np.arange(length - 1) % 256, 256)
                writer.extend(ids, ends=np.array([length]), text_bytes=np.array([length]), prompt_tokens=np.array([3]))
            shards[split] = writer.close()
    BYTE_TOKENIZER.save(directory)
    CorpusManifest(
        "uint16",
        vocab_size=257,
        tokenizer_sha256=BYTE_TOKENIZER.sha256,
        source=("text",),
        shards=shards,
        prompts=has_prompts,
    ).save(directory)


def read_corpus(directory: Path) -> None:
    """Read all windows and documents of both splits."""
    for split in SPLITS:
        corpus = Corpus(directory, split)
        corpus.check_shard_sizes()
        starts = np.arange(0, corpus.count_windows(16, 8) * 8, 8)
        corpus.read(starts, 16)
        corpus.compute_document_ids(starts, 16)
        corpus.compute_loss_weights(starts, 16, prompt_loss_weight=0)
        list(corpus.iter_documents(0, corpus.num_tokens))
        for is_packed in (False, True):
            windows = PackedWindows(
                corpus, SequenceLengths(window_tokens=17, stride_tokens=16, input_tokens=16), is_packed
            )
            windows.read(np.arange(windows.num_windows), prompt_loss_weight=0)


def write_megatron(directory: Path) -> None:
    """Write the token and index files of Megatron-LM, with an empty sequence."""
    lengths = [20, 5, 0, 30, 17]
    np.arange(sum(lengths)).astype("<u2").tofile(directory / "x.bin")
    (directory / "x.idx").write_bytes(build_megatron_index(lengths, [0, 1, 3, 4, 5]))


def write_llmc(directory: Path) -> None:
    """Write a token file of llm.c."""
    header = np.array([20240520, 1, 70, *[0] * 253], "<i4")  # magic number, version, number of ids, zeros
    (directory / "x.bin").write_bytes(header.tobytes() + np.arange(70).astype("<u2").tobytes())


def make_adopt_and_read(kind: str, name: str = "x.bin", **options: Any) -> Callable[[Path], None]:
    """Return a function that adopts the token file `name` of a folder and reads the corpus."""

    def read(directory: Path) -> None:
        out = directory / "out"
        files = str(directory / name)
        adopt(
            AdoptOptions(format=kind, data=(files,), tokenizer="byte", out=out, heldout=(files,), **options),
            io.StringIO(),
        )
        read_corpus(out)

    return read
