"""`dist-llm convert to-torch` and `from-torch` convert a checkpoint to one file of torch.save, and back."""

from collections.abc import Mapping
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import PROBE_FILE, parse_probe
from dist_llm.commands.conversion import (
    CONFIG_FILE,
    check_probe,
    console,
    read_probe,
    read_small_files,
    write_checkpoint,
)
from dist_llm.config.load import load_saved_config
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.weights import DictWeights, Weights, load_torch, require_tensors
from dist_llm.convert.write_weights import verify_written, write_atomically
from dist_llm.errors import CheckpointError


def to_torch(checkpoint: str, out: str) -> None:
    """Write one file of torch.save: {"model": tensors, "optim": tensors, "files": {name: text}}."""
    path = fetch_verified_checkpoint(checkpoint)
    weights = NativeWeights(path)
    content: dict[str, dict[str, Tensor | str]] = {"model": {}, "optim": {}}
    for name in track(weights.shapes, "reading"):
        section, _, key = name.partition(".")
        content.setdefault(section, {})[key] = weights.read(name)
    content["files"] = {name: text.decode() for name, text in read_small_files(path).items()}
    with write_atomically(Path(out)) as temporary:
        torch.save(content, temporary)
        written = flatten_weights(load_torch(temporary))
        verify_written(written, weights, torch.float32)
        check_probe(read_probe(path), compute_probe_layerwise(written, load_saved_config(path).model), path)
    console.print(f"wrote {out}: {len(weights.shapes)} tensors")


def from_torch(file: str, out: str) -> None:
    """Read a file of to-torch, and write it as a checkpoint. Raises CheckpointError if `file` is another file."""
    content = load_torch(Path(file))
    text_by_name = content.get("files")
    if not isinstance(text_by_name, dict) or not all(
        isinstance(name, str) and isinstance(text, str) for name, text in text_by_name.items()
    ):
        raise CheckpointError(f"{file}: has no entry 'files' with texts; it was not written by to-torch")
    if outside_names := [name for name in text_by_name if "/" in name or name in ("", ".", "..")]:
        raise CheckpointError(f"{file}: names a file outside the checkpoint: {outside_names[0]!r}")
    files = {name: text.encode() for name, text in text_by_name.items()}
    if CONFIG_FILE not in files:
        raise CheckpointError(f"{file}: has no {CONFIG_FILE}; it was not written by to-torch")
    probe = parse_probe(files[PROBE_FILE], f"{file}: {PROBE_FILE}") if PROBE_FILE in files else None
    write_checkpoint(Path(out), flatten_weights(content), files, source_probe=probe)


def flatten_weights(content: Mapping[str, Mapping[str, Tensor]]) -> Weights:
    """Return the tensors of a file of to-torch by names such as `model.NAME`.

    Raises CheckpointError if a value is not a tensor.
    """
    sections = {
        section: require_tensors(tensors, f"a file of torch.save: {section}")
        for section, tensors in content.items()
        if section != "files"
    }
    return DictWeights(
        {f"{section}.{key}": tensor for section, tensors in sections.items() for key, tensor in tensors.items()}
    )
