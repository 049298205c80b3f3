"""Ranks that stray from their samples end the run, all of them, and the message names those that strayed."""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.data.loader import Loader
from dist_llm.data.order import Mixture, Shuffle
from dist_llm.data.plan import MixtureStage, SamplePlan
from dist_llm.data.streams import DataSource, WindowStream
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import DataError
from dist_llm.objectives.batch import Batch
from dist_llm.train.sample_audit import SampleAudit

from .law import config_of
from .worlds import world


def strayed(config: Config, off: Callable[[int], int] | None) -> str:
    """Six steps' batches, each as long as the config says, checked every three; what the audit raised."""
    engine = NativeEngine(config, torch.device("cpu"))
    one = Mixture(0, (1,))
    source = DataSource("", None, (WindowStream(None, Shuffle(0, 9, 4), 5),), one)  # type: ignore[arg-type]
    plan = SamplePlan([source], [MixtureStage(0, one, (0,))], ((20, 30),))
    rank, ranks = engine.dp_rank_and_size
    loader = Loader(plan, None, config.data, rank, ranks, pin=False)  # type: ignore[arg-type]
    audit, first = SampleAudit(engine, loader, 3), 0
    with patch.object(loader, "offset", off(loader.offset)) if off else patch.object(loader, "pin", False):
        for _ in range(6):
            samples = torch.from_numpy(np.ascontiguousarray(loader.local_samples(first)))
            empty = torch.zeros(len(samples), 1)
            try:
                audit.add(first, [Batch(empty, empty, None, 0, sample_ids_B=samples)])  # type: ignore[arg-type]
            except DataError as error:
                return str(error)
            first = loader.advance(first)
    return ""


def same_for_all(offset: int) -> int:
    return 0


def shifted(offset: int) -> int:
    return offset + 1 if offset else offset


@pytest.mark.parametrize(
    "parallel", [{"dp_shard": 2}, {"dp_replicate": 2}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "dp_shard": 2}]
)
def test_it_is_silent_where_all_is_well_and_bites_where_not(parallel: dict[str, int]) -> None:
    ranks = 4 if len(parallel) == 2 else 2
    config = config_of(ranks, {}, parallel=parallel, data={"micro_batch": 3})
    assert world(ranks).run(strayed, config, None) == [""] * ranks
    second = {"pp": (1, 3), "tp": (2, 3)}.get(next((axis for axis in parallel if axis in ("pp", "tp")), ""), (1,))
    for bug in (same_for_all, shifted):
        for message in world(ranks).run(strayed, config, bug):
            assert message.startswith("samples 0 to ")
            assert f"ranks {', '.join(map(str, second))} did not read their planned samples" in message
