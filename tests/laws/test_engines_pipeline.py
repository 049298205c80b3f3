"""The pipeline engine of DeepSpeed computes the steps of one native process."""

from typing import Any

import pytest

from tests.laws.engines import assert_engine_matches_one_process, make_deepspeed_sections
from tests.laws.layouts import ADAMW, SGD
from tests.laws.test_engines import CLIPPED_MOMENTUM_SGD, make_engine_config

pytestmark = pytest.mark.usefixtures("restart_worlds_afterwards")
PIPELINE = {**make_deepspeed_sections(stage=1), "parallel": {"pp": 2}}


@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 6), (4, 4)], ids=["pp 2", "pp 2 x dp 2"])
@pytest.mark.parametrize("model", ["llama", "post_norm"])
@pytest.mark.parametrize("optim", [CLIPPED_MOMENTUM_SGD, ADAMW], ids=["sgd", "adamw"])
def test_the_pipeline_computes_the_steps_of_one_process(
    optim: dict[str, Any], model: str, ranks: int, micro_batch: int
) -> None:
    assert_engine_matches_one_process(
        ranks=ranks,
        config=make_engine_config(ranks=ranks, engine=PIPELINE, model=model, optim=optim, micro_batch=micro_batch),
        steps=3,
    )


def test_the_pipeline_weights_the_losses_of_prompts() -> None:
    config = make_engine_config(
        ranks=2,
        engine=PIPELINE,
        model="llama",
        optim=CLIPPED_MOMENTUM_SGD,
        micro_batch=6,
        prompt_loss_weight=0.25,
        loss={"label_smoothing": 0.1, "z_loss": 1e-2},
    )
    assert_engine_matches_one_process(ranks=2, config=config, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [SGD, CLIPPED_MOMENTUM_SGD, ADAMW], ids=["sgd", "clipped", "adamw"])
@pytest.mark.parametrize(("ranks", "micro_batch"), [(2, 8), (4, 4)], ids=["pp 2", "pp 2 x dp 2"])
def test_the_pipeline_computes_twenty_steps(ranks: int, micro_batch: int, optim: dict[str, Any]) -> None:
    assert_engine_matches_one_process(
        ranks=ranks,
        config=make_engine_config(ranks=ranks, engine=PIPELINE, model="llama", optim=optim, micro_batch=micro_batch),
        steps=20,
    )
