"""The optimizer uses the learning rate that the metrics report for the step."""

from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli import main
from dist_llm.config.load import load_saved_config
from dist_llm.engines.native import NativeEngine
from dist_llm.optim.schedule import learning_rate
from tests.e2e import commands


def test_each_step_uses_its_own_learning_rate(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original_update = NativeEngine.update

    def update_and_record(self: NativeEngine, lr: float, *args: Any) -> Any:
        rates.append(lr)
        norm = original_update(self, lr, *args)
        assert {group["lr"] for group in self.optimizer.param_groups} == {lr}
        return norm

    monkeypatch.setattr(NativeEngine, "update", update_and_record)
    monkeypatch.chdir(tmp_path)
    keys = ("run.steps=5", "schedule.warmup_steps=2", "log.peak_tflops=1")
    assert main(list(map(str, commands.make_train_arguments(corpus, *keys)))) == 0
    config = load_saved_config(commands.find_latest_checkpoint(tmp_path / "run"))
    assert rates == [learning_rate(config.optim, config.schedule, step) for step in range(1, 6)]
    assert rates == commands.get_column(commands.read_step_rows(tmp_path / "run"), "lr")
    assert len(set(rates)) == 5
