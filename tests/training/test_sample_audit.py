"""The sample audit ends the run on all ranks if a rank reads samples that are not planned, and names the rank."""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.data.loader import Loader
from dist_llm.data.order import Mixture, ShuffledOrder
from dist_llm.data.plan import MixtureStage, SamplePlan
from dist_llm.data.streams import DataSource, WindowStream
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import DataError
from dist_llm.objectives.batch import Batch
from dist_llm.training.sample_audit import SampleAudit
from tests.laws.law import make_config
from tests.laws.worlds import get_world


def run_audit(config: Config, shift: Callable[[int], int] | None) -> str:
    """Audit the samples of six steps, every three steps; return the error message of the audit, or "".

    `shift` plants a bug: a function that changes the offset at which the loader reads.
    """
    engine = NativeEngine(config, torch.device("cpu"))
    mixture = Mixture(seed=0, quotas=(1,))
    stream = WindowStream(corpus=None, order=ShuffledOrder(seed=0, num_windows=9, stride=4), window_tokens=5)  # type: ignore[arg-type]
    source = DataSource("", corpus=None, streams=(stream,), component_mixture=mixture)  # type: ignore[arg-type]
    stage = MixtureStage(first_sample=0, mixture=mixture, num_consumed=(0,))
    plan = SamplePlan([source], [stage], skip=((20, 30),))
    dp_rank, dp_size = engine.dp_rank_and_size
    loader = Loader(plan, objective=None, data=config.data, dp_rank=dp_rank, dp_size=dp_size, pin=False)  # type: ignore[arg-type]
    audit, first_sample = SampleAudit(engine, loader, interval=3), 0
    shifted_offset = shift(loader.rank_offset) if shift else loader.rank_offset
    with patch.object(loader, "rank_offset", shifted_offset):
        for _ in range(6):
            samples = torch.from_numpy(np.ascontiguousarray(loader.get_local_samples(first_sample)))
            empty = torch.zeros(len(samples), 1)
            try:
                audit.add(first_sample, [Batch(empty, empty, mask=None, num_valid_tokens=0, sample_ids_B=samples)])  # type: ignore[arg-type]
            except DataError as error:
                return str(error)
            first_sample = loader.advance(first_sample)
    return ""


def zero_offset(offset: int) -> int:
    """Planted bug: each rank reads the samples of the first data-parallel rank."""
    return 0


def shift_later_offsets(offset: int) -> int:
    """Planted bug: all ranks but the first read the sample after their own."""
    return offset + 1 if offset else offset


@pytest.mark.parametrize(
    "parallel", [{"dp_shard": 2}, {"dp_replicate": 2}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "dp_shard": 2}], ids=str
)
def test_the_audit_reports_shifted_samples_only(parallel: dict[str, int]) -> None:
    ranks = 4 if len(parallel) == 2 else 2
    config = make_config(ranks=ranks, parallel=parallel, data={"micro_batch": 3})
    assert get_world(ranks).run(run_audit, config, shift=None) == [""] * ranks
    # The ranks of the second data-parallel rank, whose offset is not 0
    bad_ranks = (1, 3) if "pp" in parallel else (2, 3) if "tp" in parallel else (1,)
    for bug in (zero_offset, shift_later_offsets):
        for message in get_world(ranks).run(run_audit, config, bug):
            assert message.startswith("samples 0 to ")
            assert f"ranks {', '.join(map(str, bad_ranks))} did not read their planned samples" in message
