"""A model whose blocks wait on a disk gives the same bits as one in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.checkpoint.state import Progress
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.convert import spread as spreading
from dist_llm.convert.spread import spread
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError
from dist_llm.generate import Prompt, Sampling, generate_tokens
from tests.laws.law import config_of, saved
from tests.laws.layouts import MODELS

CPU = torch.device("cpu")


def native(model: str, tmp_path: Path) -> tuple[NativeEngine, Path]:
    engine = NativeEngine(config_of(1, MODELS[model]), CPU)
    return engine, saved(CheckpointStore(tmp_path / "checkpoints"), engine, Progress(1), {})


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * 4 for parameter in module.parameters())


@pytest.mark.parametrize("kept", [0, 2], ids=["all blocks on disk", "two in memory"])
@pytest.mark.parametrize("model", ["llama", "tied", "t5", "bart"])
def test_it_says_what_the_whole_model_says(model: str, kept: int, tmp_path: Path) -> None:
    engine, path = native(model, tmp_path)
    (whole,) = engine.model_parts
    blocks = list(whole.blocks.values())
    memory = size(whole) - sum(map(size, blocks)) + sum(map(size, blocks[:kept])) + 100
    found = spread(path, engine.config.model, CPU, tmp_path / "disk", memory)
    away = sum(all(p.is_meta for p in block.parameters()) for block in found.blocks.values())
    assert away == len(blocks) - kept
    assert [path.name[:7] for path in (tmp_path / "disk").iterdir()] == ["blocks_"]
    source = [3, 4, 5] if engine.config.model.architecture == "encoder_decoder" else None
    prompt, sampling = Prompt([1, 2, 3], encoder_ids=source), Sampling(8, seed=2)
    want = list(generate_tokens(whole.eval(), prompt, sampling, 32))
    assert list(generate_tokens(found, prompt, sampling, 32)) == want


def test_memory_for_less_than_the_ends_is_refused(tmp_path: Path) -> None:
    engine, path = native("llama", tmp_path)
    with pytest.raises(ConfigError, match="--memory: embedding and head take"):
        spread(path, engine.config.model, CPU, tmp_path / "disk", 100)
    assert not (tmp_path / "disk").exists(), "before anything is written"


def test_what_else_lies_in_the_folder_stays(tmp_path: Path) -> None:
    engine, path = native("llama", tmp_path)
    theirs = tmp_path / "disk" / "weights" / "precious"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    spread(path, engine.config.model, CPU, tmp_path / "disk", 10**9)
    assert theirs.read_text() == "mine"
    with pytest.raises(ConfigError, match=r"--offload: .*precious cannot be made: File exists"):
        spread(path, engine.config.model, CPU, theirs, 10**9)


def test_without_accelerate_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"path": tmp_path, "config": config_of(1, {}).model}
    monkeypatch.setattr(spreading, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="accelerate is not installed"):
        spread(**options, device=CPU, folder=tmp_path, memory_bytes=1)
