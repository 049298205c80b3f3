"""DeepSpeed's pipeline takes the steps that the native engine takes in one process."""

from typing import Any

import pytest

from tests.laws.engines import hold, zero
from tests.laws.layouts import ADAMW, SGD
from tests.laws.test_engines import CLIPPED, config

pytestmark = pytest.mark.usefixtures("worlds_of_its_own")
PIPELINE = {**zero(1), "parallel": {"pp": 2}}


@pytest.mark.parametrize(("ranks", "micro"), [(2, 6), (4, 4)], ids=["pp 2", "pp 2 x dp 2"])
@pytest.mark.parametrize("model", ["llama", "post"])
@pytest.mark.parametrize("optim", [CLIPPED, ADAMW], ids=["sgd", "adamw"])
def test_deepspeeds_pipeline(optim: dict[str, Any], model: str, ranks: int, micro: int) -> None:
    hold(ranks, config(ranks, PIPELINE, model, optim, micro), steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [SGD, CLIPPED, ADAMW], ids=["sgd", "clipped", "adamw"])
@pytest.mark.parametrize(("ranks", "micro"), [(2, 8), (4, 4)])
def test_twenty_steps_of_the_pipeline(ranks: int, micro: int, optim: dict[str, Any]) -> None:
    hold(ranks, config(ranks, PIPELINE, "llama", optim, micro), steps=20)
