"""Resume and init_from require the model of the checkpoint, except for changes that the config requests."""

from pathlib import Path
from typing import Any

import pytest

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.compatibility import compare_for_init, compare_for_resume, compare_parameters
from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model
from tests.laws.law import make_config

QWEN2, QWEN3 = {"qkv_bias": True}, {"qk_norm": True}
# (the checkpoint's model, the config's model, the error). Each was once accepted without an error.
INCOMPATIBLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rope_theta": ({}, {"rope_theta": 5e5}, "rope_theta: 10000.0 in the checkpoint, 500000.0 in this config"),
    "twice the heads": ({"n_heads": 4, "head_dim": 8}, {"n_heads": 8, "head_dim": 4}, "n_heads: 4 in the checkpoint"),
    "norm order": ({}, {"norm_order": "post"}, "norm_order: pre in the checkpoint, post in this config"),
    "no positions": ({}, {"positions": "none"}, "positions: rope in the checkpoint, none in this config"),
    "one of the layers": ({"n_layers": 3}, {"n_layers": 1}, "n_layers: 3 in the checkpoint, 1 in this config"),
    "Qwen2 biases": (QWEN2, {}, "qkv_bias: True in the checkpoint, False in this config"),
    "Qwen3 norms": (QWEN3, {}, "qk_norm: True in the checkpoint, False in this config"),
    "norm_eps": ({}, {"norm_eps": 1e-6}, "norm_eps: 1e-05 in the checkpoint, 1e-06 in this config"),
    "vocabulary": ({}, {"vocab_size": 131}, "vocab_size: 130 in the checkpoint, 131 in this config"),
}
FIXED = {"model.n_heads", "model.head_dim"}


def write_config(directory: Path, model: dict[str, Any], **sections: Any) -> Path:
    """Write the config.yaml of a checkpoint; return the directory."""
    (directory / "config.yaml").write_text(dump_config(make_config(ranks=1, model=model, **sections)), encoding="utf-8")
    return directory


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_resume_refuses_a_model_of_another_function(case: str, tmp_path: Path) -> None:
    before, current, message = INCOMPATIBLE[case]
    path = write_config(tmp_path, before)
    compare_for_resume(CheckpointFolder(path), make_config(ranks=1, model=before))
    with pytest.raises(CheckpointError, match=f"(?s)cannot resume.*model.{message}.*Set these keys"):
        compare_for_resume(CheckpointFolder(path), make_config(ranks=1, model=current))


@pytest.mark.parametrize("case", INCOMPATIBLE)
def test_init_from_refuses_changes_without_a_request(case: str, tmp_path: Path) -> None:
    before, current, message = INCOMPATIBLE[case]
    path = write_config(tmp_path, before)
    assert compare_for_init(path, make_config(ranks=1, model=before)) == []
    with pytest.raises(CheckpointError, match=f"(?s)a different model from the checkpoint.*model.{message}"):
        compare_for_init(path, make_config(ranks=1, model=current))
    start = {"init_from": str(path), "init_allow": [f"model.{key}" for key in current or before]}
    if FIXED & set(start["init_allow"]):
        return
    requested = compare_for_init(path, make_config(ranks=1, model=current, **start))
    assert {difference.key for difference in requested} == set(start["init_allow"])


def test_a_request_allows_only_the_named_keys(tmp_path: Path) -> None:
    path = write_config(tmp_path, {})
    start = {"init_from": str(path), "init_allow": ["model.rope_theta"]}
    with pytest.raises(
        CheckpointError, match=r"(?s)norm_eps.*set init_allow=\[model.rope_theta,model.norm_eps\]"
    ) as error:
        compare_for_init(path, make_config(ranks=1, model={"rope_theta": 5e5, "norm_eps": 1e-6}, **start))
    assert "rope_theta: 10000.0" not in str(error.value)


def test_another_objective_needs_a_request(tmp_path: Path) -> None:
    path = write_config(tmp_path, {})
    prefix = {"objective": {"name": "prefix"}, "init_from": str(path)}
    with pytest.raises(CheckpointError, match="objective: causal in the checkpoint, prefix"):
        compare_for_init(path, make_config(ranks=1, **prefix))
    assert len(compare_for_init(path, make_config(ranks=1, **prefix, init_allow=["objective"]))) == 1


def test_harmless_differences_are_allowed_and_reported(tmp_path: Path) -> None:
    path = write_config(tmp_path, {})
    differences = compare_for_resume(
        CheckpointFolder(path), make_config(ranks=1, model={"dropout": 0.1, "init_std": 0.1})
    )
    assert [str(difference) for difference in differences] == [
        "model.dropout: 0.0 in the checkpoint, 0.1 in this config",
        "model.init_std: 0.02 in the checkpoint, 0.1 in this config",
    ]


def test_an_invalid_config_is_reported(tmp_path: Path) -> None:
    path = write_config(tmp_path, {})
    (path / "config.yaml").write_text((path / "config.yaml").read_text() + "later_key: 1\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config.yaml: later_key: unknown key.*use that version"):
        compare_for_resume(CheckpointFolder(path), make_config(ranks=1))


@pytest.mark.parametrize(("before", "current"), [(QWEN2, {}), ({}, QWEN3), ({"n_layers": 5}, {})])
def test_every_parameter_of_the_checkpoint_is_used(
    before: dict[str, Any], current: dict[str, Any], tmp_path: Path
) -> None:
    """A parameter without use is an error, also if the config of the checkpoint does not describe it."""

    def shapes(config: Config) -> dict[str, tuple[int, ...]]:
        return {
            f"model.{name}": tuple(parameter.shape) for name, parameter in build_model(config.model).named_parameters()
        }

    old, new = make_config(ranks=1, model=before), make_config(ranks=1, model=current)
    assert compare_parameters(tmp_path, shapes(old), old.model, allow_differences=False) == ([], [])
    with pytest.raises(CheckpointError, match=r"the checkpoint (lacks|has) blocks"):
        compare_parameters(tmp_path, shapes(old), new.model, allow_differences=False)
    added, dropped = compare_parameters(tmp_path, shapes(old), new.model, allow_differences=True)
    assert bool(added) == (current == QWEN3)
    assert bool(dropped) == (current != QWEN3)
