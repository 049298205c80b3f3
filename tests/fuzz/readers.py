"""The readers of files that the fuzz tests check: by the kind of the files, how to write valid files and read them.

    reader = READERS["corpus"]
    reader.write(folder)  # an empty folder
    reader.read(folder)  # reads all content

A new reader of files in dist_llm gets an entry in READERS.
"""

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

from dist_llm.convert.deepspeed_read import open_deepspeed
from dist_llm.convert.export_tokenizers import export_tokenizer, import_tokenizer
from dist_llm.text.report import PrepareReport
from dist_llm.text.tokenizer import Tokenizer

from .checkpoint_files import (
    GPT2,
    make_write_deepspeed,
    make_write_hf,
    read_all_weights,
    read_checkpoint,
    read_hf,
    read_nanogpt,
    write_checkpoint,
    write_hf_bin,
    write_legacy_bin,
    write_nanogpt,
)
from .corpus_files import BYTE_TOKENIZER, make_adopt_and_read, read_corpus, write_corpus, write_llmc, write_megatron
from .text_files import (
    encode_json_lines,
    make_read_tokenizer,
    make_write_bytes,
    make_write_table,
    read_metrics,
    read_text,
    read_yaml,
    write_metrics,
    write_parquet,
    write_report,
    write_tiktoken,
    write_yaml,
)


@dataclass(frozen=True)
class Reader:
    """Two functions of a folder: `write` writes valid files into it, and `read` reads all content of the files."""

    write: Callable[[Path], None]
    read: Callable[[Path], object]


# By the kind of the files. A name is part of the random seed of its mutations.
READERS: dict[str, Reader] = {
    "corpus": Reader(write_corpus, read_corpus),
    "corpus with prompts": Reader(lambda directory: write_corpus(directory, has_prompts=True), read_corpus),
    "megatron": Reader(write_megatron, make_adopt_and_read("megatron")),
    "nanogpt bin": Reader(
        lambda directory: np.arange(70).astype("<u2").tofile(directory / "x.bin"),
        make_adopt_and_read("bin", dtype="uint16"),
    ),
    "npy": Reader(
        lambda directory: np.save(directory / "x.npy", np.arange(70).astype("u2")), make_adopt_and_read("npy", "x.npy")
    ),
    "llmc": Reader(write_llmc, make_adopt_and_read("llmc")),
    "checkpoint": Reader(write_checkpoint, read_checkpoint),
    "safetensors": Reader(make_write_hf("llama", {}), read_hf),
    "gpt2": Reader(make_write_hf("gpt2", GPT2), read_hf),
    "pytorch_model.bin": Reader(lambda directory: write_hf_bin(directory, sharded=False), read_hf),
    "pytorch_model.bin of many": Reader(write_hf_bin, read_hf),
    "pytorch_model.bin of old": Reader(write_legacy_bin, read_hf),
    "ckpt.pt": Reader(write_nanogpt, read_nanogpt),
    "zero 1": Reader(
        make_write_deepspeed(universal=False, stage=1), lambda directory: read_all_weights(open_deepspeed(directory))
    ),
    "zero 3": Reader(
        make_write_deepspeed(universal=False, stage=3), lambda directory: read_all_weights(open_deepspeed(directory))
    ),
    "universal": Reader(
        make_write_deepspeed(universal=True), lambda directory: read_all_weights(open_deepspeed(directory))
    ),
    "yaml": Reader(write_yaml, read_yaml),
    "json lines": Reader(make_write_bytes("x.jsonl", encode_json_lines), read_text),
    "parquet": Reader(write_parquet, read_text),
    "csv": Reader(make_write_table("x.csv", ","), read_text),
    "tsv": Reader(make_write_table("x.tsv", "\t"), read_text),
    "text": Reader(
        make_write_bytes("x.txt", encode_json_lines), lambda directory: read_text(directory, separator="row")
    ),
    "gz": Reader(make_write_bytes("x.jsonl.gz", lambda: gzip.compress(encode_json_lines())), read_text),
    "zst": Reader(make_write_bytes("x.jsonl.zst", lambda: zstandard.compress(encode_json_lines())), read_text),
    "xz": Reader(make_write_bytes("x.jsonl.xz", lambda: lzma.compress(encode_json_lines())), read_text),
    "bz2": Reader(make_write_bytes("x.jsonl.bz2", lambda: bz2.compress(encode_json_lines())), read_text),
    "metrics": Reader(write_metrics, read_metrics),
    "tokenizer.json": Reader(BYTE_TOKENIZER.save, lambda directory: Tokenizer.load(directory).encode("some text")),
    "tiktoken": Reader(write_tiktoken, make_read_tokenizer("x.tiktoken")),
    "tokenizer of hf": Reader(lambda directory: export_tokenizer(BYTE_TOKENIZER, directory), import_tokenizer),
    "prepare's report": Reader(write_report, PrepareReport.load),
}
