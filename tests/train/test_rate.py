"""A schedule is planned when a run starts; a resume with another run.steps keeps it, or replans it if told to."""

import json
import logging
from pathlib import Path

import pytest

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.folder import Folder
from dist_llm.config.derive import resolve
from dist_llm.config.load import dump
from dist_llm.config.schema import Config
from dist_llm.optim.schedule import learning_rate
from dist_llm.train.rate import plan_rate
from tests.laws.law import MODEL


def config_with(steps: int, **schedule: object) -> Config:
    """As `read_config` returns it: resolved, but for a decay_steps of 0."""
    raw = {
        "run": {"dir": "run", "steps": steps},
        "model": MODEL,
        "data": {"path": "x", "seq_len": 8, "global_batch": 4},
        "optim": {"lr": 1e-2},
        "schedule": schedule,
    }
    config = Config.model_validate(raw)
    return resolve(config, 1, 0).model_copy(update={"schedule": config.schedule})


def checkpoint_of(config: Config, step: int, directory: Path) -> Folder:
    (directory / "config.yaml").write_text(dump(plan_rate(config, None)))
    (directory / "progress.json").write_text(json.dumps(Progress(step=step).as_dict()))
    return Folder(directory)


def rate_of(config: Config, step: int) -> float:
    return learning_rate(config.optim, config.schedule, step)


def test_a_start_plans_the_decay_to_the_last_step() -> None:
    assert plan_rate(config_with(100), None).schedule.decay_steps == 100
    assert plan_rate(config_with(100, decay_steps=30), None).schedule.decay_steps == 30


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_an_extended_run_stays_at_the_floor_and_says_so(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    checkpoint = checkpoint_of(config_with(100, name=name), 100, tmp_path)
    found = plan_rate(config_with(200, name=name), checkpoint)
    assert found.schedule.decay_steps == 100
    assert rate_of(found, 101) == pytest.approx(1e-3)
    (line,) = caplog.messages
    replanned = rate_of(plan_rate(config_with(200, name=name), None), 101)
    assert "planned to end at step 100 and does, though run.steps is 200 now: step 101 has 0.001" in line
    assert line.endswith(f"With schedule.on_extend=replan it would have {replanned:.3g}")


def test_a_replanned_run_says_both_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = checkpoint_of(config_with(100), 100, tmp_path)
    found = plan_rate(config_with(200, on_extend="replan"), checkpoint)
    assert found.schedule.decay_steps == 200
    assert caplog.messages == [
        f"learning rate of step 101: 0.001 by the checkpoint's config, {rate_of(found, 101):.3g} by this one"
    ]


def test_an_explicit_number_of_steps_is_what_the_config_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = checkpoint_of(config_with(100), 100, tmp_path)
    assert plan_rate(config_with(200, decay_steps=200), checkpoint).schedule.decay_steps == 200
    assert "0.001 by the checkpoint's config" in caplog.text


def test_another_peak_or_warm_up_is_told_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = checkpoint_of(config_with(100), 10, tmp_path)
    plan_rate(config_with(100, warmup_steps=50), checkpoint)
    assert "by the checkpoint's config, 0.0022 by this one" in caplog.text


@pytest.mark.parametrize(("before", "after"), [({}, {}), ({"name": "constant"}, {"name": "constant"})])
def test_where_the_rate_is_the_same_nothing_is_said(
    before: dict[str, object], after: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    steps = 200 if before else 100
    plan_rate(config_with(steps, **after), checkpoint_of(config_with(100, **before), 50, tmp_path))
    assert caplog.messages == []


def test_a_kept_plan_is_kept_by_the_next_resume(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(config_with(100), 100, tmp_path)
    extended = plan_rate(config_with(200), checkpoint)
    (tmp_path / "config.yaml").write_text(dump(extended))
    assert plan_rate(config_with(300), checkpoint) == config_with(300).model_copy(
        update={"schedule": extended.schedule}
    )
