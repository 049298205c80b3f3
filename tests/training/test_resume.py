"""The losses of repeated steps are compared with the earlier ones, if the config is the same."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config
from dist_llm.training.resume import NUM_COMPARED_STEPS, EarlierSteps
from tests.laws.law import make_config

LOSSES = {step: 5.0 - step / 100 for step in range(1, 31)}


def write_run(directory: Path, config: Config) -> Path:
    """Write the metrics of LOSSES, other rows and an incomplete row, and the config; return the run directory."""
    lines = [json.dumps({"step": step, "loss": loss, "lr": 0.1}) for step, loss in LOSSES.items()]
    incomplete_rows = [
        json.dumps({"step": 9, "heldout_loss": 4.0}),
        json.dumps({"step": 9, "event": "x"}),
        '{"step": 31, "lo',
    ]
    (directory / "metrics.jsonl").write_text("\n".join(lines + incomplete_rows), encoding="utf-8")
    (directory / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return directory


def make_rows(first_step: int, last_step: int, changes: dict[int, float] | None = None) -> list[dict[str, Any]]:
    """Return the rows of steps with the losses of LOSSES, except for `changes` by step."""
    return [
        {"step": step, "loss": (changes or {}).get(step, LOSSES[step])} for step in range(first_step, last_step + 1)
    ]


def test_the_first_steps_are_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(ranks=1)
    earlier = EarlierSteps.read(write_run(tmp_path, config), step=8, config=config)
    assert list(earlier.losses) == list(range(9, 9 + NUM_COMPARED_STEPS))
    with caplog.at_level(logging.INFO):
        assert earlier.compare([{"step": 9, "heldout_loss": 3.0}]) == []
    earlier = EarlierSteps.read(tmp_path, step=8, config=config)
    with caplog.at_level(logging.INFO):
        assert earlier.compare(make_rows(first_step=9, last_step=12, changes={10: LOSSES[10] * (1 + 5e-5)})) == [], (
            "a difference within rounding is reported"
        )
        assert earlier.compare(make_rows(first_step=13, last_step=30, changes={30: 1.0})) == [], (
            "a later step is compared"
        )
    assert f"{NUM_COMPARED_STEPS} repeated steps have the same losses as before the restart" in caplog.text


@pytest.mark.parametrize("loss", [LOSSES[10] * 1.001, float("nan")])
def test_a_different_loss_is_an_event(loss: float, tmp_path: Path) -> None:
    config = make_config(ranks=1)
    (event,) = EarlierSteps.read(write_run(tmp_path, config), step=8, config=config).compare(
        make_rows(first_step=9, last_step=30, changes={10: loss})
    )
    assert event["step"] == 10
    assert f"step 10 had a loss of 4.9 before the run was resumed, and now has {loss:.9g}" in event["event"]
    bf16_config = make_config(ranks=1, precision="bf16")
    events = EarlierSteps.read(write_run(tmp_path, bf16_config), step=8, config=bf16_config).compare(
        make_rows(first_step=9, last_step=30, changes={10: loss})
    )
    assert bool(events) == (loss != loss), "bf16 does not report NaN alone"


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"optim": {"lr": 0.5}}, "optim"),
        ({"data": {"skip": [[4, 8]]}}, "data.skip"),
        ({"run": {"seed": 4}}, "run.seed"),
        ({"model": {"dropout": 0.1}}, "model"),
        ({"precision": "bf16"}, "precision"),
    ],
)
def test_steps_of_another_config_are_not_compared(
    sections: dict[str, Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        ranks=1,
        model=sections.get("model", {}),
        **{key: section for key, section in sections.items() if key != "model"},
    )
    with caplog.at_level(logging.INFO):
        assert EarlierSteps.read(write_run(tmp_path, make_config(ranks=1)), step=8, config=config).losses == {}
    assert f"the losses of repeated steps are not compared with the earlier ones: {name} changed" in caplog.text


def test_another_layout_or_checkpoint_interval_is_compared(tmp_path: Path) -> None:
    config = make_config(ranks=2, parallel={"tp": 2}, checkpoint={"every": 3}, data={"micro_batch": 4})
    assert (
        len(EarlierSteps.read(write_run(tmp_path, make_config(ranks=1)), step=8, config=config).losses)
        == NUM_COMPARED_STEPS
    )
    assert EarlierSteps.read(tmp_path / "nowhere", step=8, config=config).losses == {}
