"""Every conversion measures the probe again, and refuses weights or a config with another result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import PROBE_FILE, Probe, parse_probe
from dist_llm.config.load import load_saved_config
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.weights import DictWeights
from dist_llm.convert.write_weights import write_native
from tests.convert.test_hf_import import NATIVE_MODELS, run_convert, write_native_checkpoint

__all__ = ["run_convert"]  # a fixture
ERROR = "the weights do not compute what they computed when they were saved: the probe's loss was "


def read_probe(directory: Path) -> Probe:
    """Return the probe in a directory."""
    probe = parse_probe((directory / PROBE_FILE).read_bytes(), str(directory))
    assert probe is not None
    return probe


def write_checkpoint_with_probe(directory: Path, **changes: Any) -> Path:
    """Write a checkpoint with a probe, as a run saves it."""
    checkpoint = write_native_checkpoint(directory, NATIVE_MODELS["llama"] | changes)
    weights = NativeWeights(checkpoint)
    files = {entry.name: entry.read_bytes() for entry in checkpoint.iterdir() if entry.suffix in (".json", ".yaml")}
    tensors = DictWeights({name: weights.read(name) for name in weights.shapes})
    files |= {PROBE_FILE: compute_probe_layerwise(tensors, load_saved_config(checkpoint).model).dump()}
    del files["manifest.json"]
    shutil.rmtree(checkpoint)
    write_native(checkpoint, tensors, files)
    return checkpoint


def scale_tensor(directory: Path, name: str) -> None:
    """Multiply one tensor of an export by 1.5."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * 1.5}, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_export_has_a_probe_that_an_import_compares(
    dtype: str, run_convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native = write_checkpoint_with_probe(tmp_path / "native")
    assert run_convert("to-hf", native, tmp_path / "hf", "--dtype", dtype) == 0
    out = capsys.readouterr().out
    assert out.count("the probe's loss was") == 2, "the probe was not compared for both the checkpoint and the output"
    assert read_probe(tmp_path / "hf").weights == dtype
    assert read_probe(tmp_path / "hf").loss == pytest.approx(
        read_probe(native).loss, rel=5e-3 if dtype == "bf16" else 1e-6
    )
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "round_trip") == 0
    assert "the probe's loss was" in capsys.readouterr().out
    assert read_probe(tmp_path / "round_trip").loss == read_probe(tmp_path / "hf").loss
    assert run_convert("verify", tmp_path / "round_trip") == 0

    scale_tensor(tmp_path / "hf", "model.layers.1.self_attn.o_proj.weight")
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "wrong") == 2
    assert ERROR in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_a_changed_config_of_an_export_is_refused(
    run_convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_convert("to-hf", write_checkpoint_with_probe(tmp_path / "native"), tmp_path / "hf") == 0
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 5e5
    path.write_text(json.dumps(config))
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "wrong") == 2
    assert ERROR in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "to-hf", "to-torch", "to-deepspeed"])
def test_weights_that_differ_from_the_probe_are_refused(
    command: str, run_convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native, other = (
        write_checkpoint_with_probe(tmp_path / "native"),
        write_checkpoint_with_probe(tmp_path / "other", logit_cap=2.0),
    )
    files = {entry.name: entry.read_bytes() for entry in native.iterdir() if entry.suffix in (".json", ".yaml")}
    del files["manifest.json"]
    weights = NativeWeights(native)
    shutil.rmtree(other)
    changed = {name: weights.read(name) * (1.5 if "blocks.1.feedforward" in name else 1) for name in weights.shapes}
    write_native(other, DictWeights(changed), files)
    out = {"verify": [], "to-deepspeed": [tmp_path / "out", "--universal"]}.get(command, [tmp_path / "out"])
    assert run_convert(command, native, *out) == 0
    if (tmp_path / "out").exists():
        (tmp_path / "out").rename(tmp_path / "first")
    capsys.readouterr()
    assert run_convert(command, other, *out) == 2
    assert ERROR in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_torch_file_is_compared_with_its_probe(
    run_convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_convert("to-torch", write_checkpoint_with_probe(tmp_path / "native"), tmp_path / "native.pt") == 0
    content = torch.load(tmp_path / "native.pt", weights_only=True)
    assert run_convert("from-torch", tmp_path / "native.pt", tmp_path / "round_trip") == 0
    content["model"]["blocks.0.attention.q.weight"] *= 3
    torch.save(content, tmp_path / "changed.pt")
    capsys.readouterr()
    assert run_convert("from-torch", tmp_path / "changed.pt", tmp_path / "wrong") == 2
    assert ERROR in capsys.readouterr().err


def test_weights_without_a_saved_probe_get_a_new_one(
    run_convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An average, and the export of a checkpoint of 0.1.0, which has no probe."""
    first, old = (
        write_checkpoint_with_probe(tmp_path / "1"),
        write_native_checkpoint(tmp_path / "2", NATIVE_MODELS["llama"]),
    )
    assert run_convert("verify", old) == 0
    assert "has no probe that this version can compare" in capsys.readouterr().out
    weights = NativeWeights(first)
    shutil.rmtree(old)
    files = {entry.name: entry.read_bytes() for entry in first.iterdir() if entry.suffix in (".json", ".yaml")}
    files = {name: entry for name, entry in files.items() if name not in ("manifest.json", PROBE_FILE)}
    write_native(old, DictWeights({name: weights.read(name) * 2 for name in weights.shapes}), files)
    assert run_convert("average", tmp_path / "mean", old, first) == 0
    assert run_convert("verify", tmp_path / "mean") == 0
    assert read_probe(tmp_path / "mean").loss != pytest.approx(read_probe(first).loss, rel=1e-3)
    assert run_convert("to-hf", old, tmp_path / "hf") == 0
    assert PROBE_FILE in {path.name for path in (tmp_path / "hf").iterdir()}
