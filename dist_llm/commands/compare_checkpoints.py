"""`dist-llm convert average`, `diff`, `inspect` and `verify`: average, compare and check checkpoints."""

from pathlib import Path

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dist_llm.checkpoint import manifest
from dist_llm.checkpoint.compatibility import read_config
from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint, resolve_checkpoint
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.commands.conversion import check_probe, console, read_probe, read_small_files, write_checkpoint
from dist_llm.commands.convert_torch import flatten_weights
from dist_llm.config.compare import find_function_differences
from dist_llm.config.load import load_saved_config
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.weights import TORCH_FILE, TORCH_INDEX_FILE, LazyWeights, Weights, load_torch, open_huggingface
from dist_llm.errors import CheckpointError


def average(out: str, checkpoints: list[str]) -> None:
    """Write the mean of the weights of several checkpoints, without optimizer state.

    Raises CheckpointError if they are not of the same model.
    """
    paths = [fetch_verified_checkpoint(checkpoint) for checkpoint in checkpoints]
    all_weights = [NativeWeights(path) for path in paths]
    shapes = _model_shapes(all_weights[0])
    for path, weights in zip(paths, all_weights, strict=True):
        if _model_shapes(weights) != shapes:
            raise CheckpointError(f"{path}: is not a checkpoint of the same model as {paths[0]}")
        differences = find_function_differences(read_config(paths[0]), read_config(path))
        if differences := [difference for difference in differences if difference.key != "objective"]:
            values = f"{differences[0].key} {differences[0].current}, {differences[0].saved} there"
            raise CheckpointError(f"{path}: is not a checkpoint of the same model as {paths[0]}: {values}")

    def mean(name: str) -> Tensor:
        return torch.stack([weights.read(name).double() for weights in all_weights]).mean(0).float()

    write_checkpoint(Path(out), LazyWeights(shapes, mean), read_small_files(paths[-1]))


def _model_shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in weights.shapes.items() if name.startswith("model.")}


def diff(a: str, b: str, show_equal: bool = False) -> int:
    """Print the tensors that differ. Returns 1 if there are any, else 0."""
    first, second = open_weights(a), open_weights(b)  # the names of the command-line arguments
    names = sorted(first.shapes.keys() | second.shapes.keys())
    table = Table("tensor", "shape", "largest difference", "relative to the norm")
    num_different = 0
    for name in track(names, "comparing"):
        if first.shapes.get(name) != second.shapes.get(name):
            num_different += 1
            table.add_row(name, f"{_format_shape(first, name)} and {_format_shape(second, name)}", "", "")
            continue
        left, right = first.read(name).double(), second.read(name).double()
        is_equal = torch.equal(left, right)
        num_different += not is_equal
        if not is_equal or show_equal:
            delta = left - right
            relative = float(delta.norm() / left.norm()) if left.norm() else float(delta.norm())
            table.add_row(name, _format_shape(first, name), f"{float(delta.abs().max()):.3e}", f"{relative:.3e}")
    if table.row_count:
        console.print(table)
    console.print(f"{num_different} of {len(names)} tensors differ")
    return 1 if num_different else 0


def inspect(checkpoint: str) -> int:
    """Print a table of the tensors. Returns 2 if a value is not finite, else 0."""
    weights = open_weights(checkpoint)
    table = Table("tensor", "shape", "dtype", "norm", "largest", "not finite")
    num_not_finite = num_elements = 0
    for name in track(sorted(weights.shapes), "reading"):
        tensor = weights.read(name)
        is_finite = torch.isfinite(tensor)
        num_not_finite_here, values = int((~is_finite).sum()), tensor[is_finite].double()
        num_not_finite += num_not_finite_here
        num_elements += tensor.numel()
        largest = float(values.abs().max()) if values.numel() else 0.0
        dtype = str(tensor.dtype).removeprefix("torch.")
        norm = f"{float(values.norm()):.4g}"
        table.add_row(name, _format_shape(weights, name), dtype, norm, f"{largest:.4g}", str(num_not_finite_here))
    console.print(table)
    console.print(f"{len(weights.shapes)} tensors, {num_elements:,} elements, {num_not_finite:,} of them not finite")
    return 2 if num_not_finite else 0


def verify(checkpoint: str) -> None:
    """Check all bytes against the manifest, and the weights against the probe. Raises CheckpointError."""
    folder = resolve_checkpoint(checkpoint)
    manifest.verify_checkpoint(folder)
    console.print(f"{folder}: all bytes are as they were saved")
    path = folder.local_path or fetch_verified_checkpoint(checkpoint)
    saved = read_probe(path)
    check_probe(
        saved, compute_probe_layerwise(NativeWeights(path), load_saved_config(path).model) if saved else None, path
    )


def open_weights(source: str) -> Weights:
    """Open the tensors of a run, a checkpoint, a Hugging Face directory, or a file of to-torch."""
    path = Path(source)
    if path.is_file():
        return flatten_weights(load_torch(path))
    if any(path.glob("*.safetensors")) or (path / TORCH_FILE).exists() or (path / TORCH_INDEX_FILE).exists():
        return open_huggingface(path)
    return NativeWeights(fetch_verified_checkpoint(source))


def _format_shape(weights: Weights, name: str) -> str:
    return "×".join(map(str, weights.shapes[name])) if name in weights.shapes else "none"
