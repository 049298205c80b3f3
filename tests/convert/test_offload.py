"""A model with blocks on disk computes exactly the same as a model in memory."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.convert import offload
from dist_llm.convert.offload import load_offloaded
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError
from dist_llm.generation import Prompt, Sampling, generate_tokens
from tests.laws.law import make_config, save_checkpoint
from tests.laws.layouts import MODELS

CPU = torch.device("cpu")
SLACK_BYTES = 100  # below the size of a block, so that no further block fits in memory


class SavedModel(NamedTuple):
    """A model in memory, and its checkpoint."""

    engine: NativeEngine
    path: Path


def save_model(model: str, tmp_path: Path) -> SavedModel:
    """Build a model, a key of MODELS, and save its checkpoint."""
    engine = NativeEngine(make_config(ranks=1, model=MODELS[model]), CPU)
    return SavedModel(engine, save_checkpoint(CheckpointStore(tmp_path / "checkpoints"), engine, Progress(step=1), {}))


def count_parameter_bytes(module: torch.nn.Module) -> int:
    """Return the size of all parameters in fp32."""
    return sum(parameter.numel() * 4 for parameter in module.parameters())


@pytest.mark.parametrize("num_loaded", [0, 2], ids=["all blocks on disk", "two in memory"])
@pytest.mark.parametrize("model", ["llama", "tied", "t5", "bart"])
def test_offloaded_model_generates_the_same_tokens(model: str, num_loaded: int, tmp_path: Path) -> None:
    engine, path = save_model(model, tmp_path)
    (in_memory,) = engine.model_parts
    blocks = list(in_memory.blocks.values())
    memory_bytes = (
        count_parameter_bytes(in_memory)
        - sum(map(count_parameter_bytes, blocks))
        + sum(map(count_parameter_bytes, blocks[:num_loaded]))
        + SLACK_BYTES
    )
    offloaded = load_offloaded(path, engine.config.model, CPU, tmp_path / "disk", memory_bytes)
    is_on_disk = [all(parameter.is_meta for parameter in block.parameters()) for block in offloaded.blocks.values()]
    assert is_on_disk.count(True) == len(blocks) - num_loaded
    assert [folder.name[:7] for folder in (tmp_path / "disk").iterdir()] == ["blocks_"]
    source = [3, 4, 5] if engine.config.model.architecture == "encoder_decoder" else None
    prompt, sampling = Prompt([1, 2, 3], encoder_ids=source), Sampling(max_tokens=8, seed=2)
    expected = list(generate_tokens(in_memory.eval(), prompt, sampling, max_seq_len=32))
    assert list(generate_tokens(offloaded, prompt, sampling, max_seq_len=32)) == expected


def test_memory_below_embedding_and_head_is_refused(tmp_path: Path) -> None:
    engine, path = save_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="--memory: embedding and head must stay in memory"):
        load_offloaded(path, engine.config.model, CPU, tmp_path / "disk", memory_bytes=100)
    assert not (tmp_path / "disk").exists(), "the refused command wrote files"


def test_other_files_in_the_offload_folder_are_kept(tmp_path: Path) -> None:
    engine, path = save_model("llama", tmp_path)
    existing = tmp_path / "disk" / "weights" / "precious"
    existing.parent.mkdir(parents=True)
    existing.write_text("mine")
    load_offloaded(path, engine.config.model, CPU, tmp_path / "disk", memory_bytes=10**9)
    assert existing.read_text() == "mine"


def test_a_file_at_the_path_of_the_offload_folder_is_reported(tmp_path: Path) -> None:
    engine, path = save_model("llama", tmp_path)
    existing = tmp_path / "precious"
    existing.write_text("mine")
    with pytest.raises(ConfigError, match=r"--offload: .*precious cannot be created: File exists"):
        load_offloaded(path, engine.config.model, CPU, existing, memory_bytes=10**9)


def test_missing_accelerate_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"path": tmp_path, "config": make_config(ranks=1).model}
    monkeypatch.setattr(offload, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="accelerate is not installed"):
        load_offloaded(**options, device=CPU, folder=tmp_path, memory_bytes=1)
