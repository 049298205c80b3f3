"""Shared code of all conversions: the files of a new checkpoint, progress bars, and the comparison of probes."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress as ProgressBar
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.load_checkpoint import PROGRESS_FILE
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import PROBE_FILE, Probe, compare_probes, parse_probe
from dist_llm.config.load import dump_config, parse_saved_config
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.convert.hf_parity import compare_logits
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.weights import LazyWeights, Weights
from dist_llm.convert.write_weights import verify_written, write_atomically, write_native
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer

CONFIG_FILE = "config.yaml"
OBJECTIVES = {"encoder": "masked", "encoder_decoder": "span"}  # of an imported architecture; else causal

console = Console(highlight=False, markup=False, soft_wrap=True)


def write_checkpoint(
    out: Path,
    weights: Weights,
    files: Mapping[str, bytes],
    hf_directory: Path | None = None,
    source_probe: Probe | None = None,
) -> None:
    """Write a checkpoint of fp32 weights and small files to `out`; read it back and compare before `out` appears.

    With `hf_directory`, also compare logits with it. `source_probe` is the probe of the source.

    Raises CheckpointError if a tensor, the logits or the probe differ.
    """
    probe = compute_probe_layerwise(weights, parse_saved_config(files[CONFIG_FILE].decode(), CONFIG_FILE).model)
    if source_probe is not None:
        check_probe(source_probe, replace(probe, weights=source_probe.weights), out)
    with write_atomically(out) as temporary:
        with show_progress(weights, "converting") as tracked:
            write_native(temporary, tracked, {**files, PROBE_FILE: probe.dump()})
        with show_progress(weights, "checking") as tracked:
            verify_written(NativeWeights(temporary), tracked, torch.float32)
        if hf_directory is not None:
            console.print(compare_logits(temporary, hf_directory))
    console.print(f"wrote {out}: {len(weights.shapes)} tensors, {probe}; train it with init_from={out}")


def read_probe(directory: Path) -> Probe | None:
    """Read the probe of a checkpoint or export. Return None if there is none, or this version cannot compare it."""
    path = directory / PROBE_FILE
    return parse_probe(path.read_bytes(), str(path)) if path.exists() else None


def check_probe(expected: Probe | None, actual: Probe | None, path: Path) -> None:
    """Raise CheckpointError if two probes differ by more than rounding; else print how close they are."""
    if expected is None or actual is None:
        console.print(f"{path}: has no probe that this version can compare; the weights are used without this check")
    else:
        console.print(compare_probes(expected, actual, str(path)))


def build_checkpoint_files(model: ModelConfig, tokenizer: Tokenizer | None, source: Path) -> dict[str, bytes]:
    """Return the small files of a checkpoint for an imported model: config, environment, progress, tokenizer."""
    config = Config.model_validate(
        {
            "run": {"dir": str(source), "steps": 1},
            "model": model.model_dump(),
            "data": {"seq_len": model.max_seq_len, "global_batch": 1, "micro_batch": 1},
            "objective": {"name": OBJECTIVES.get(model.architecture, "causal")},
        }
    )
    files = {
        CONFIG_FILE: dump_config(config).encode(),
        "environment.json": json.dumps({"converted_from": str(source), "dist-llm": version("dist-llm")}).encode(),
        **build_initial_progress(),
    }
    return files | ({TOKENIZER_FILE: tokenizer.to_json_bytes()} if tokenizer is not None else {})


def build_initial_progress() -> dict[str, bytes]:
    """Return the progress file of a run at step 0."""
    return {PROGRESS_FILE: json.dumps(Progress().as_dict()).encode()}


def read_small_files(checkpoint: Path) -> dict[str, bytes]:
    """Read the files beside the tensors of a checkpoint: {name: content}."""
    return {
        file.name: file.read_bytes()
        for file in checkpoint.iterdir()
        if file.suffix in (".json", ".yaml") and file.name != "manifest.json"
    }


@contextmanager
def show_progress(weights: Weights, label: str) -> Iterator[Weights]:
    """Yield the same weights; a progress bar counts the tensors that are read from them."""
    with ProgressBar() as bar:
        task = bar.add_task(label, total=len(weights.shapes))

        def read(name: str) -> Tensor:
            bar.advance(task)
            return weights.read(name)

        yield LazyWeights(weights.shapes, read)
