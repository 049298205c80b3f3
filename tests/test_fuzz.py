"""Each reader of files either reads a damaged or hostile file or raises a UserError.

A reader must not raise another exception, hang, or allocate memory for a size that a file only declares. The tests
limit the time and the address space.
"""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from pyarrow import parquet

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.compatibility import read_config
from dist_llm.checkpoint.manifest import read_manifest, verify_checkpoint
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import parse_probe
from dist_llm.checkpoint.store import read_progress
from dist_llm.config.check import check
from dist_llm.config.load import dump_config, load_config
from dist_llm.config.schema import Config
from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.convert import hf_convert
from dist_llm.convert.deepspeed_read import open_deepspeed
from dist_llm.convert.deepspeed_write import write_deepspeed, write_universal
from dist_llm.convert.export_tokenizers import export_tokenizer, import_tokenizer
from dist_llm.convert.nanogpt import from_nanogpt, to_nanogpt
from dist_llm.convert.weights import DictWeights, Weights, load_torch, open_huggingface
from dist_llm.convert.write_weights import write_native
from dist_llm.data import data_history
from dist_llm.data.corpus import Corpus
from dist_llm.data.packed_windows import PackedWindows
from dist_llm.data.shard import SPLITS, Manifest, ShardWriter
from dist_llm.errors import UserError
from dist_llm.observe.metrics import MetricsFile
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.inputs import iter_documents, open_inputs
from dist_llm.text.report import InputFileCounts, PrepareReport
from dist_llm.text.rows import RowFormat, RowTracker
from dist_llm.text.tokenizer import ENDOFTEXT, Tokenizer
from dist_llm.training.resume import EarlierSteps
from tests.text.test_token_files import build_megatron_index

MAX_READER_BYTES = 1 << 29  # address space that a reader may use; the files have some kilobytes
TIMEOUT_SECONDS = 60  # after this time a reader counts as hanging
NUM_MUTATIONS, NUM_SLOW_MUTATIONS = 8, 400  # per reader

MODEL = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4, "d_ff": 16, "vocab_size": 64,
         "vocab_multiple": 1, "max_seq_len": 16}  # fmt: skip
GPT2 = {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu_tanh", "tie_embeddings": True}
ROWS = [{"text": f"row {n} é\n", "n": n} for n in range(20)]
BYTE_TOKENIZER = BPETokenizer("byte", SPLIT_PATTERNS["gpt2"], {bytes([i]): i for i in range(256)}, {ENDOFTEXT: 256})


class HangError(BaseException):
    """A reader takes too long. The class is not an `Exception`, because readers may catch those."""


@dataclass(frozen=True)
class Reader:
    """Two functions of a folder: `write` writes valid files into it, and `read` reads all content of the files."""

    write: Callable[[Path], None]
    read: Callable[[Path], object]


def make_config(**model: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {**MODEL, **model},
            "data": {"seq_len": 16, "global_batch": 1, "micro_batch": 1},
        }
    )


def make_weights(config: Config, moments: Collection[str] = ()) -> DictWeights:
    """Return random weights, with the AdamW state of the parameters in `moments`."""
    tensors = {}
    for name, shape in hf_convert.model_shapes(config.model).items():
        tensors[f"model.{name}"] = torch.randn(shape)
        if name in moments:
            tensors |= {f"optim.{name}.{key}": torch.rand(shape) for key in ("exp_avg", "exp_avg_sq")}
            tensors[f"optim.{name}.step"] = torch.tensor(3.0)
    return DictWeights(tensors)


def read_all(weights: Weights) -> None:
    for name, shape in weights.shapes.items():
        assert tuple(weights.read(name).shape) == shape, name


# Corpora


def write_corpus(directory: Path, has_prompts: bool = False) -> None:
    shards = {}
    for split in SPLITS:
        with ShardWriter(directory, split, "uint16", max_tokens=60, has_prompts=has_prompts) as writer:
            for length in (20, 5, 30, 17, 40):
                ids = np.append(np.arange(length - 1) % 256, 256)
                writer.extend(ids, ends=np.array([length]), text_bytes=np.array([length]), prompt_tokens=np.array([3]))
            shards[split] = writer.close()
    BYTE_TOKENIZER.save(directory)
    Manifest(
        "uint16",
        vocab_size=257,
        tokenizer_sha256=BYTE_TOKENIZER.sha256,
        source=("text",),
        shards=shards,
        prompts=has_prompts,
    ).save(directory)


def read_corpus(directory: Path) -> None:
    for split in SPLITS:
        corpus = Corpus(directory, split)
        corpus.check_shard_sizes()
        starts = np.arange(0, corpus.count_windows(16, 8) * 8, 8)
        corpus.read(starts, 16)
        corpus.compute_document_ids(starts, 16)
        corpus.compute_loss_mask(starts, 16)
        list(corpus.iter_documents(0, corpus.num_tokens))
        for is_packed in (False, True):
            windows = PackedWindows(
                corpus, SequenceLengths(window_tokens=17, stride_tokens=16, input_tokens=16), is_packed
            )
            windows.read(np.arange(windows.num_windows), score_prompts=False)


def write_megatron(directory: Path) -> None:
    lengths = [20, 5, 0, 30, 17]
    np.arange(sum(lengths)).astype("<u2").tofile(directory / "x.bin")
    (directory / "x.idx").write_bytes(build_megatron_index(lengths, [0, 1, 3, 4, 5]))


def write_llmc(directory: Path) -> None:
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


# Checkpoints


def write_checkpoint(directory: Path) -> None:
    config = make_config()
    segment = data_history.Segment(
        step=0, first_sample=0, global_batch=1, skip=((3, 4),),
        spec=data_history.DataSpec(
            first_sample=0, tokens=0, sample_tokens=16, seed=1, order="shuffle", windows="stream", seq_len=16,
            objective=({},), tokenizer="none", sources=(data_history.SourceRecord(name="", path="/x", content="y"),),
            stages=(data_history.StageRecord(from_tokens=0, quotas=(1,)),),
        ),
    )  # fmt: skip
    files = {
        "config.yaml": dump_config(config).encode(),
        "progress.json": json.dumps(Progress(step=3, samples=4, tokens=5, source_tokens={"a": 1}).as_dict()).encode(),
        "data.json": data_history.dump_history((segment,)),
        "probe.json": b'{"format": "dist_llm probe 1", "loss": 1.5, "logits": [1.0, null], "precision": "fp32", '
        b'"weights": "fp32"}',
        "tokenizer.json": BYTE_TOKENIZER.to_json_bytes(),
    }
    write_native(directory, make_weights(config, {"head.norm.weight"}), files)


def read_checkpoint(directory: Path) -> None:
    """Read all files, also after an error in the manifest.

    An attacker who changes a file can change its hash in the manifest too.
    """
    folder = CheckpointFolder(directory)
    problems: list[UserError] = []
    for read in (
        lambda: read_manifest(folder),
        lambda: verify_checkpoint(folder),
        lambda: read_all(NativeWeights(directory)),
        lambda: hf_convert.model_shapes(read_config(directory).model),
        lambda: read_progress(folder),
        lambda: data_history.parse_history(folder.read("data.json"), "data.json"),
        lambda: parse_probe(folder.read("probe.json"), "probe.json"),
        lambda: Tokenizer.load(directory).build_objective_vocabulary(with_word_edges=True),
    ):
        try:
            read()
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[-1]  # the first problems are wrong hashes


def make_write_hf(family: str, model: dict[str, Any]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        config = make_config(**model)
        hf_convert.export_hf(
            make_weights(config), config, tokenizer=None, directory=directory / "hf", family=family, shard_bytes=3000
        )
        for file in (directory / "hf").iterdir():
            file.rename(directory / file.name)
        (directory / "hf").rmdir()

    return write


def write_hf_bin(directory: Path, sharded: bool = True) -> None:
    make_write_hf("gpt2", GPT2)(directory)
    weights = open_huggingface(directory)
    names = sorted(weights.shapes)
    names_by_file = {"a.bin": names[::2], "b.bin": names[1::2]} if sharded else {"pytorch_model.bin": names}
    for file, file_names in names_by_file.items():
        torch.save({name: weights.read(name) for name in file_names}, directory / file)
    if sharded:
        weight_map = {name: file for file, file_names in names_by_file.items() for name in file_names}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in directory.glob("model*.safetensors*"):
        file.unlink()


def write_legacy_bin(directory: Path) -> None:
    """Write the weights in the format of torch before version 1.6."""
    write_hf_bin(directory, sharded=False)
    file = directory / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def read_hf(directory: Path) -> None:
    family, model = hf_convert.read_config(directory)
    hf_convert.read_token_ids(directory)
    weights = open_huggingface(directory)
    read_all(weights)
    read_all(hf_convert.from_huggingface(weights, model, family))


def write_nanogpt(directory: Path) -> None:
    config = make_config(**GPT2 | {"activation": "gelu", "d_ff": 4 * MODEL["d_model"]})
    torch.save(to_nanogpt(make_weights(config), config), directory / "ckpt.pt")


def read_nanogpt(directory: Path) -> None:
    model, weights = from_nanogpt(load_torch(directory / "ckpt.pt"))
    read_all(hf_convert.from_huggingface(weights, model, "nanogpt"))


def make_write_deepspeed(universal: bool, stage: int = 2) -> Callable[[Path], None]:
    """Return a function that writes a universal or a ZeRO checkpoint of DeepSpeed."""

    def write(directory: Path) -> None:
        config = make_config()
        names = list(hf_convert.model_shapes(config.model))
        weights = make_weights(config, names)
        if universal:
            write_universal(directory, weights, step=3)
        else:
            settings = [{"lr": 0.1}]
            write_deepspeed(
                directory, weights, stage, world_size=2, groups=[names], settings=settings, step=3, shared={}
            )

    return write


# Text


def write_parquet(directory: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), directory / "x.parquet")


def make_write_table(name: str, delimiter: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        with (directory / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def encode_json_lines() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def make_write_bytes(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content()) and None


def read_text(directory: Path, **keys: Any) -> None:
    inputs = open_inputs([str(directory)], RowFormat(**keys))
    row_tracker = RowTracker(max_bad_rate=1.0)
    for document in iter_documents(inputs, row_tracker):
        document.text.encode()
    row_tracker.check()


def read_metrics(directory: Path) -> None:
    EarlierSteps.read(directory, step=3, config=make_config()).compare([{"step": 4, "loss": 1.0}])
    MetricsFile(directory / "metrics.jsonl", resumed_step=3).close()


def encode_metrics() -> bytes:
    rows = [{"step": step, "loss": 5.0 / step, "lr": 1e-3} for step in range(1, 9)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in [*rows[:4], {"step": 4, "event": "x"}, *rows[4:]])


def write_metrics(directory: Path) -> None:
    (directory / "metrics.jsonl").write_bytes(encode_metrics())
    (directory / "config.yaml").write_text(dump_config(make_config()))


def read_yaml(directory: Path) -> None:
    config, _ = load_config(directory / "config.yaml")
    if config is not None:
        list(check(config, world_size=1, tokenizer_size=257))


def write_yaml(directory: Path) -> None:
    (directory / "base.yaml").write_text(dump_config(make_config()))
    (directory / "config.yaml").write_text("base: base.yaml\ndata: &d {path: x, seq_len: 64}\noptim: {lr: 3e-4}\n")


def write_tiktoken(directory: Path) -> None:
    lines = (base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256))
    (directory / "x.tiktoken").write_bytes(b"".join(lines))


def make_read_tokenizer(name: str) -> Callable[[Path], object]:
    return lambda directory: build_tokenizer(str(directory / name)).encode("some text")


def write_report(directory: Path) -> None:
    file_counts = InputFileCounts()
    file_counts.add("read", directory / "x.jsonl", 100)
    PrepareReport({"source": ["x"]}, rows=10, bad_rows=1, inputs=file_counts, unreadable={"y": (3, "gone")}).save(
        directory
    )


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
        make_write_deepspeed(universal=False, stage=1), lambda directory: read_all(open_deepspeed(directory))
    ),
    "zero 3": Reader(
        make_write_deepspeed(universal=False, stage=3), lambda directory: read_all(open_deepspeed(directory))
    ),
    "universal": Reader(make_write_deepspeed(universal=True), lambda directory: read_all(open_deepspeed(directory))),
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

SIZE_CLAIMS = [-1, 0, 1, -(2**31), 2**31 - 1, 2**32 - 1, 10**15, 2**63 - 1, -(2**63)]
WRONG_VALUES = [None, True, -1, 0, 10**15, 2**64, -(10**400), 1e308, float("nan"), float("inf"), "", "x", "../x",
          "/etc/passwd", "a\0b", "\ud800", [], {}, [[]], {"a": 1}, 2.5]  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damage the content, or change sizes in it. In JSON also change the types of values."""
    mutations = [
        _truncate,
        _append_bytes,
        _flip_bits,
        _flip_bits,
        _swap_halves,
        _replace_binary_number,
        _replace_binary_number,
        _replace_number,
        _replace_number,
        _delete_or_repeat_range,
    ]
    if content[:1] in (b"{", b"["):
        mutations += [_replace_value] * 8
    return rng.choice(mutations)(content, rng)


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, 1, len(content) - 1, rng.randrange(len(content) + 1)])]


def _append_bytes(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice([b"\0", bytes(8), rng.randbytes(100), content, b"[" * 100_000, b"{" * 100_000])


def _flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 10]) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _swap_halves(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[end:] + content[start:end] + content[:start]


def _delete_or_repeat_range(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return rng.choice([content[:start] + content[end:], content[:end] + content[start:]])


def _replace_binary_number(content: bytes, rng: random.Random) -> bytes:
    """Overwrite a binary number, mostly one in the header."""
    size = rng.choice(SIZE_CLAIMS)
    num_bytes = rng.choice([4, 8])
    packed = struct.pack("<q", size)[:num_bytes]
    if num_bytes == 4 and size < 0:
        packed = struct.pack("<i", max(size, -(2**31)))
    offset = rng.randrange(min(len(content), rng.choice([64, 64, len(content)])) + 1)
    return content[:offset] + packed + content[offset + num_bytes :]


def _replace_number(content: bytes, rng: random.Random) -> bytes:
    """Replace a decimal number by another number or by something else."""
    matches = list(re.finditer(rb"-?\d+(\.\d+)?", content))
    if not matches:
        return _replace_binary_number(content, rng)
    match = rng.choice(matches)
    value = rng.choice(
        [b"-1", b"0", b"1000000000000000", b"9" * 30, b"9" * 5000, b"1e999", b"null", b'"x"', b"[]", b""]
    )
    return content[: match.start()] + value + content[match.end() :]


def _replace_value(content: bytes, rng: random.Random) -> bytes:
    """Change the type of a value in a JSON file, or delete or rename a key."""
    try:
        document = json.loads(content)
    except ValueError:
        return _flip_bits(content, rng)
    nodes: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        # Long lists and tables have items of one kind, so a sample is enough.
        for key in keys if len(keys) < 20 else rng.sample(list(keys), 20):
            nodes.append((node, key))
            if isinstance(node[key], dict | list):
                stack.append(node[key])
    if not nodes:
        return json.dumps(rng.choice(WRONG_VALUES)).encode()
    node, key = rng.choice(nodes)
    choice = rng.random()
    if isinstance(node, dict) and choice < 0.2:
        del node[key]
    elif isinstance(node, dict) and choice < 0.3:
        node[rng.choice(["x", "", "../x", "__class__"])] = node.pop(key)
    else:
        node[key] = rng.choice(WRONG_VALUES)
    return json.dumps(document).encode()


@contextmanager
def limit_memory_and_time() -> Iterator[None]:
    """Limit the address space and the time of the block."""

    def raise_hang_error(*_: object) -> None:
        raise HangError

    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    old_limits = resource.getrlimit(resource.RLIMIT_AS)
    old_handler = signal.signal(signal.SIGALRM, raise_hang_error)
    signal.alarm(TIMEOUT_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + MAX_READER_BYTES, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old_limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)


@pytest.fixture(scope="module")
def get_valid_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a reader to a folder with valid files.

    The function writes the folder once and checks that the reader reads it.
    """
    folders: dict[str, Path] = {}

    def write_once(name: str) -> Path:
        if name not in folders:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("valid") / "folder"
            folder.mkdir()
            READERS[name].write(folder)
            copy = folder.with_name("copy")
            shutil.copytree(folder, copy)
            READERS[name].read(copy)
            folders[name] = folder
        return folders[name]

    return write_once


def read_mutations(name: str, mutation_ids: range, folder: Path, directory: Path) -> None:
    """Damage a file in a copy of `folder` and read the copy, once for each mutation id."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for mutation_id in mutation_ids:
        rng = random.Random(f"{name} {mutation_id}")
        target = directory / str(mutation_id)
        shutil.copytree(folder, target)
        path = target / (files[mutation_id % len(files)] if mutation_id < len(files) else rng.choice(files))
        content = path.read_bytes()
        path.write_bytes(mutate(content, rng))
        try:
            with limit_memory_and_time():
                READERS[name].read(target)
        except UserError:
            pass
        except BaseException as error:
            error.add_note(f"{name}, mutation {mutation_id}: {path}")
            raise
        shutil.rmtree(target)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_raise_a_named_error(
    name: str, get_valid_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    read_mutations(name, range(NUM_MUTATIONS), get_valid_folder(name), tmp_path)


class ShellCommand:
    """An object whose pickle runs a shell command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("checkpoint", ".metadata"),
        ("checkpoint", "__0_0.distcp"),
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("pytorch_model.bin of many", "a.bin"),
        ("pytorch_model.bin of old", "pytorch_model.bin"),
        ("ckpt.pt", "ckpt.pt"),
        ("zero 1", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero 3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("universal", "fp32.pt"),
    ],
)
def test_reading_runs_no_command(name: str, file: str, get_valid_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, marker = tmp_path / "folder", tmp_path / "ran"  # the command would write the marker
    shutil.copytree(get_valid_folder(name), folder)
    path = next(folder.rglob(file))
    if file == ".metadata":
        path.write_bytes(pickle.dumps(ShellCommand(marker)))
    elif file.endswith(".distcp"):
        content = io.BytesIO()
        torch.save({"param": ShellCommand(marker)}, content)
        path.write_bytes(content.getvalue() + path.read_bytes()[len(content.getvalue()) :])
    else:
        torch.save({"param": torch.ones(2), "x": ShellCommand(marker)}, path)
    with pytest.raises(UserError):
        READERS[name].read(folder)
    assert not marker.exists()


def make_replace(file: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """Return an edit of a folder that replaces `old` by `new` in a file."""

    def edit(directory: Path) -> None:
        content = (directory / file).read_bytes()
        assert old in content, content[:1000]
        (directory / file).write_bytes(content.replace(old, new, 1))

    return edit


def make_claim(file: str, offset: int, layout: str, value: int) -> Callable[[Path], None]:
    """Return an edit that overwrites the binary number at a byte offset. `layout` is its format in `struct`."""

    def edit(directory: Path) -> None:
        content = bytearray((directory / file).read_bytes())
        struct.pack_into(layout, content, offset, value)
        (directory / file).write_bytes(content)

    return edit


def make_torch_edit(file: str, edit_content: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return an edit of the object in a file of torch.save."""

    def edit(directory: Path) -> None:
        content = torch.load(directory / file, weights_only=True)
        edit_content(content)
        torch.save(content, directory / file)

    return edit


def enlarge_tensor(directory: Path) -> None:
    """Claim 10**15 elements for a tensor in `.metadata`."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    entry = next(entry for name, entry in metadata.state_dict_metadata.items() if name.endswith("tokens.weight"))
    entry.size = torch.Size((10**12, 1000))
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def enlarge_tensor_consistently(directory: Path) -> None:
    """Claim 10**15 elements for a tensor, in all fields of `.metadata` that tell its size."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.endswith("tokens.weight"))
    entry = metadata.state_dict_metadata[name]
    entry.size = entry.chunks[0].sizes = torch.Size((10**12, 1000))
    for index, storage in metadata.storage_data.items():
        if index.fqn == name:
            storage.length = 10**16
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


# A YAML file whose aliases expand to 9**11 values.
YAML_ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
FILE_OUTSIDE = b'"file": "../train-00000.bin"'
ABSOLUTE_FILE = b'"file": "/etc/passwd"'
HUGE_SIZE = 10**15
# What the file claims: (reader, edit of the valid folder, pattern of the error)
HOSTILE_EDITS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "tokens": (
        "corpus",
        make_replace("manifest.json", b'"tokens": 55', b'"tokens": 1000000000000000'),
        "less than or equal",
    ),
    "documents": (
        "corpus",
        make_replace("manifest.json", b'"documents": 3', b'"documents": 99999999999'),
        "truncated at",
    ),
    "offset": (
        "corpus",
        make_claim("train-00000.offsets", offset=16, layout="<Q", value=2**63 + 5),
        "document offsets do not ascend within",
    ),
    "far offset": (
        "corpus",
        make_claim("train-00000.offsets", offset=16, layout="<Q", value=HUGE_SIZE),
        "document offsets do not ascend within",
    ),
    "prompt": (
        "corpus with prompts",
        make_claim("train-00000.offsets", offset=8, layout="<Q", value=HUGE_SIZE),
        "document offsets do not ascend",
    ),
    "shard outside": (
        "corpus",
        make_replace("manifest.json", b'"file": "train-00000.bin"', FILE_OUTSIDE),
        "outside the corpus",
    ),
    "shard of root": (
        "corpus",
        make_replace("manifest.json", b'"file": "train-00000.bin"', ABSOLUTE_FILE),
        "outside the corpus",
    ),
    "sequences": (
        "megatron",
        make_claim("x.idx", offset=18, layout="<Q", value=HUGE_SIZE),
        "truncated: .* but 1000000000000000 sequences",
    ),
    "negative sequence": (
        "megatron",
        make_claim("x.idx", offset=38, layout="<i", value=-3),
        "byte 38: sequence 1 has -3 tokens",
    ),
    "safetensors header": (
        "safetensors",
        make_claim("model-00001-of-00003.safetensors", offset=0, layout="<Q", value=HUGE_SIZE),
        "cannot be read",
    ),
    "safetensors index": (
        "safetensors",
        make_replace("model.safetensors.index.json", b"model-00001-of", b"../model-00001-of"),
        "names a file outside its directory",
    ),
    "torch index": (
        "pytorch_model.bin of many",
        make_replace("pytorch_model.bin.index.json", b'"a.bin"', b'"/etc/passwd"'),
        "names a file outside its directory",
    ),
    "layers": (
        "gpt2",
        make_replace("config.json", b'"n_layer": 1', b'"n_layer": 1000000000000000'),
        "not a number of layers",
    ),
    "width": ("gpt2", make_replace("config.json", b'"n_embd": 8', b'"n_embd": 1000000000000000'), "less than or equal"),
    "expanded tensor": (
        "ckpt.pt",
        make_torch_edit(
            "ckpt.pt",
            lambda content: content["model"].update({"transformer.wpe.weight": torch.ones(1, 1).expand(HUGE_SIZE, 8)}),
        ),
        "larger than the file",
    ),
    "sparse tensor": (
        "ckpt.pt",
        make_torch_edit("ckpt.pt", lambda content: content["model"].update(x=torch.ones(1).to_sparse())),
        "no plain tensor",
    ),
    "larger tensor": ("checkpoint", enlarge_tensor, "has shape .* but 512 elements in its chunks"),
    "longer tensor": ("checkpoint", enlarge_tensor_consistently, "but its tensors end at byte"),
    "tag outside": ("zero 1", make_replace("latest", b"global_step3", b"../x"), "does not name a directory beside it"),
    "ranks": (
        "zero 1",
        make_torch_edit(
            "global_step3/mp_rank_00_model_states.pt", lambda content: content.update(dp_world_size=HUGE_SIZE)
        ),
        "ranks saved it",
    ),
    "aliases": (
        "yaml",
        lambda directory: (directory / "config.yaml").write_text(YAML_ALIASES),
        "more than 100,000 values",
    ),
    "nested": ("yaml", lambda directory: (directory / "config.yaml").write_text("[" * 9999), "nested too deeply"),
    "nested manifest": ("corpus", lambda directory: (directory / "manifest.json").write_text("[" * 99999), "as JSON"),
    "id": ("tokenizer.json", make_replace("tokenizer.json", b": 255", b": 1000000000000000"), "below 16777216"),
}


@pytest.mark.parametrize("hostile_claim", HOSTILE_EDITS)
def test_hostile_files_are_rejected(
    hostile_claim: str, get_valid_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name, edit, message = HOSTILE_EDITS[hostile_claim]
    folder = tmp_path / "folder"
    shutil.copytree(get_valid_folder(name), folder)
    edit(folder)
    with limit_memory_and_time(), pytest.raises(UserError, match=message):
        READERS[name].read(folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files(name: str, get_valid_folder: Callable[[str], Path], tmp_path: Path) -> None:
    read_mutations(name, range(NUM_MUTATIONS, NUM_SLOW_MUTATIONS), get_valid_folder(name), tmp_path)
