"""DeepSpeed and accelerate measure the probe that one process measures natively, before and after a step."""

from typing import Any

import pytest

from dist_llm.checkpoint.probe import compare_probes
from dist_llm.config.schema import Config
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.train.step import train_step
from tests.laws.engines import CPU, ENGINES, opened
from tests.laws.law import batches_of, config_of
from tests.laws.layouts import ADAMW
from tests.laws.test_engines_pipeline import PIPELINE
from tests.laws.worlds import world

pytestmark = pytest.mark.usefixtures("worlds_of_its_own")
MODEL = {"init_std": 0.4}  # so that every part has a say


def probes(config: Config) -> list[Any]:
    with opened(config) as engine:
        found = [measure_probe(engine, config)]
        train_step(engine, batches_of(config, engine, 0), 0.0, 0)
        return [*found, measure_probe(engine, config)]


@pytest.mark.parametrize("name", ["zero1", "zero3", "ddp", "pipeline"])
def test_an_engine_measures_what_one_process_does(name: str) -> None:
    losses = {"loss": {"label_smoothing": 0.1, "z_loss": 1e-2}}
    one = config_of(1, MODEL, optim=ADAMW, **losses)
    want = measure_probe(NativeEngine(one, CPU), one)
    engine = {**ENGINES, "pipeline": PIPELINE}[name]
    config = config_of(2, MODEL, optim=ADAMW, data={"micro_batch": 6}, **engine, **losses)
    for ranks in world(2).run(probes, config):
        for found in ranks:
            assert found.loss == pytest.approx(want.loss, rel=2e-5)
            compare_probes(want, found, name)
