"""DeepSpeed and accelerate measure the same probe as one native process, before and after a step."""

from typing import Any

import pytest

from dist_llm.checkpoint.probe import compare_probes
from dist_llm.config.schema import Config
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.training.step import train_step
from tests.laws.engines import CPU, ENGINE_SECTIONS, open_engine
from tests.laws.law import make_batches, make_config
from tests.laws.layouts import ADAMW
from tests.laws.test_engines_pipeline import PIPELINE
from tests.laws.worlds import get_world

pytestmark = pytest.mark.usefixtures("restart_worlds_afterwards")
MODEL = {"init_std": 0.4}  # so that every module affects the loss


def measure_probes(config: Config) -> list[Any]:
    """Return the probes before and after a step with learning rate 0."""
    with open_engine(config) as engine:
        results = [measure_probe(engine, config)]
        train_step(engine, make_batches(config, engine, step=0), lr=0.0, step=0)
        return [*results, measure_probe(engine, config)]


@pytest.mark.parametrize("name", ["zero1", "zero3", "ddp", "pipeline"])
def test_an_engine_measures_the_probe_of_one_process(name: str) -> None:
    losses = {"loss": {"label_smoothing": 0.1, "z_loss": 1e-2}}
    native_config = make_config(ranks=1, model=MODEL, optim=ADAMW, **losses)
    expected = measure_probe(NativeEngine(native_config, CPU), native_config)
    engine = {**ENGINE_SECTIONS, "pipeline": PIPELINE}[name]
    config = make_config(ranks=2, model=MODEL, optim=ADAMW, data={"micro_batch": 6}, **engine, **losses)
    for rank_probes in get_world(2).run(measure_probes, config):
        for probe in rank_probes:
            assert probe.loss == pytest.approx(expected.loss, rel=2e-5)
            compare_probes(expected, probe, name)
