"""`dist-llm convert to-nanogpt` and `from-nanogpt` convert a checkpoint to the file ckpt.pt of nanoGPT, and back."""

from pathlib import Path

import torch

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.load_checkpoint import read_progress
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.commands.conversion import (
    build_checkpoint_files,
    check_probe,
    console,
    read_probe,
    show_progress,
    write_checkpoint,
)
from dist_llm.config.load import load_saved_config
from dist_llm.convert import hf_import, nanogpt
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.weights import load_torch
from dist_llm.convert.write_weights import write_atomically
from dist_llm.text.build_tokenizer import build_tokenizer


def from_nanogpt(file: str, out: str, tokenizer: str | None = None) -> None:
    """Convert a ckpt.pt to a checkpoint. Raises CheckpointError if nanoGPT did not write the file."""
    source = nanogpt.parse_nanogpt(load_torch(Path(file)), file)
    built_tokenizer = build_tokenizer(tokenizer) if tokenizer else None
    weights = hf_import.from_huggingface(source.weights, source.config, "nanogpt")
    write_checkpoint(Path(out), weights, build_checkpoint_files(source.config, built_tokenizer, Path(file)))


def to_nanogpt(checkpoint: str, out: str) -> None:
    """Write a ckpt.pt. Raises CheckpointError if nanoGPT cannot express the model."""
    path = fetch_verified_checkpoint(checkpoint)
    config, weights = load_saved_config(path), NativeWeights(path)
    with write_atomically(Path(out)) as temporary:
        with show_progress(weights, "converting") as tracked:
            torch.save(nanogpt.build_nanogpt(tracked, config, read_progress(CheckpointFolder(path)).step), temporary)
        probe = compute_probe_layerwise(weights, config.model)
        check_probe(read_probe(path), probe, path)
        written = nanogpt.parse_nanogpt(load_torch(temporary), str(temporary))
        native_weights = hf_import.from_huggingface(written.weights, written.config, "nanogpt")
        written_probe = compute_probe_layerwise(native_weights, written.config)
        check_probe(probe, written_probe, temporary)
    console.print(f"wrote {out}: {len(written.weights.shapes)} tensors; nanoGPT starts with a new optimizer state")
