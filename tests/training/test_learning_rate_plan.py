"""The schedule is planned when a run starts. A resumed run keeps the plan, or replans it on request."""

import json
import logging
from pathlib import Path

import pytest

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.config.derive import resolve_config
from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.optim.schedule import learning_rate
from dist_llm.training.learning_rate_plan import plan_learning_rate
from tests.laws.law import MODEL


def make_config(steps: int, **schedule: object) -> Config:
    """Return a config as `read_config` does: resolved, except for a decay_steps of null."""
    raw = {
        "run": {"dir": "run", "steps": steps},
        "model": MODEL,
        "data": {"path": "x", "seq_len": 8, "global_batch": 4},
        "optim": {"lr": 1e-2},
        "schedule": schedule,
    }
    config = UnresolvedConfig.model_validate(raw)
    return resolve_config(config, world_size=1, tokenizer_size=0).model_copy(update={"schedule": config.schedule})


def write_checkpoint(config: Config, step: int, directory: Path) -> CheckpointFolder:
    """Write the config and the progress of a checkpoint."""
    (directory / "config.yaml").write_text(dump_config(plan_learning_rate(config, checkpoint=None)))
    (directory / "progress.json").write_text(json.dumps(Progress(step=step).as_dict()))
    return CheckpointFolder(directory)


def learning_rate_of(config: Config, step: int) -> float:
    """Return the learning rate of a step."""
    return learning_rate(config.optim, config.schedule, step)


def test_a_start_plans_the_decay_to_the_last_step() -> None:
    assert plan_learning_rate(make_config(steps=100), checkpoint=None).schedule.decay_steps == 100
    assert plan_learning_rate(make_config(steps=100, decay_steps=30), checkpoint=None).schedule.decay_steps == 30


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_an_extended_run_stays_at_the_minimum_and_logs_it(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    checkpoint = write_checkpoint(make_config(steps=100, name=name), step=100, directory=tmp_path)
    planned = plan_learning_rate(make_config(steps=200, name=name), checkpoint=checkpoint)
    assert planned.schedule.decay_steps == 100
    assert learning_rate_of(planned, step=101) == pytest.approx(1e-3)
    (line,) = caplog.messages
    replanned = learning_rate_of(plan_learning_rate(make_config(steps=200, name=name), checkpoint=None), step=101)
    assert "planned to end at step 100 and still does, although run.steps is now 200: step 101 has 0.001" in line
    assert line.endswith(f"With schedule.on_extend=replan it would have {replanned:.3g}")


def test_a_replanned_run_logs_both_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint(make_config(steps=100), step=100, directory=tmp_path)
    planned = plan_learning_rate(make_config(steps=200, on_extend="replan"), checkpoint=checkpoint)
    assert planned.schedule.decay_steps == 200
    rate = learning_rate_of(planned, step=101)
    assert caplog.messages == [f"learning rate of step 101: 0.001 by the checkpoint's config, {rate:.3g} by this one"]


def test_explicit_decay_steps_are_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint(make_config(steps=100), step=100, directory=tmp_path)
    assert (
        plan_learning_rate(make_config(steps=200, decay_steps=200), checkpoint=checkpoint).schedule.decay_steps == 200
    )
    assert "0.001 by the checkpoint's config" in caplog.text


def test_a_changed_peak_or_warmup_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint(make_config(steps=100), step=10, directory=tmp_path)
    plan_learning_rate(make_config(steps=100, warmup_steps=50), checkpoint=checkpoint)
    assert "by the checkpoint's config, 0.0022 by this one" in caplog.text


@pytest.mark.parametrize(("before", "after"), [({}, {}), ({"name": "constant"}, {"name": "constant"})])
def test_an_unchanged_rate_is_not_logged(
    before: dict[str, object], after: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    steps = 200 if before else 100
    plan_learning_rate(
        make_config(steps=steps, **after),
        checkpoint=write_checkpoint(make_config(steps=100, **before), step=50, directory=tmp_path),
    )
    assert caplog.messages == []


def test_the_next_resume_keeps_the_plan(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(make_config(steps=100), step=100, directory=tmp_path)
    extended = plan_learning_rate(make_config(steps=200), checkpoint=checkpoint)
    (tmp_path / "config.yaml").write_text(dump_config(extended))
    assert plan_learning_rate(make_config(steps=300), checkpoint=checkpoint) == make_config(steps=300).model_copy(
        update={"schedule": extended.schedule}
    )
