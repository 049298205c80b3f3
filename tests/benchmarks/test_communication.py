"""benchmarks/communication.py counts the calls and bytes that formulas predict for two ranks."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import communication
from benchmarks.communication import (
    CASES,
    GLOBAL_BATCH,
    MODEL,
    SEQ_LEN,
    WireCounter,
    count_traffic,
    format_document,
    make_case,
    select_busiest_rank,
)
from dist_llm.config.derive import AXES
from tests.laws.worlds import WorldError, get_world

WIDTH, VOCAB_SIZE, NUM_LAYERS = MODEL["d_model"], MODEL["vocab_size"], MODEL["n_layers"]
# Parameters of q, of k and v, of the output projection, of the feed-forward layer and of the norms.
BLOCK_PARAMS = WIDTH * 64 + 2 * WIDTH * 32 + 64 * WIDTH + 3 * WIDTH * MODEL["d_ff"] + 2 * WIDTH
PARAMS = NUM_LAYERS * BLOCK_PARAMS + 2 * VOCAB_SIZE * WIDTH + WIDTH
ACTIVATION_BYTES = 4 * GLOBAL_BATCH * SEQ_LEN * WIDTH


def count_busiest(**keys: Any) -> dict[str, Any]:
    """Return the traffic of the rank that sends most on two ranks; `keys` are fields of the case."""
    return select_busiest_rank(get_world(2).run(count_traffic, make_case(**keys)))


def sum_sent(row: dict[str, Any], kind: str) -> tuple[int, int]:
    """Sum (calls, bytes) of one kind over all axes."""
    kind_rows = [kind_row for kind_row in row["by_axis"] if kind_row["kind"] == kind]
    return sum(kind_row["calls"] for kind_row in kind_rows), sum(kind_row["bytes"] for kind_row in kind_rows)


def test_replicas_all_reduce_each_gradient_once() -> None:
    row = count_busiest(dp_replicate=2, micro_batch=2)
    # Over two ranks an all-reduce sends as many bytes as it reduces: a group per block and one for the rest, the
    # number of valid tokens (int64) and the loss.
    assert sum_sent(row, "all-reduce") == (NUM_LAYERS + 1 + 2, 4 * PARAMS + 8 + 4)
    assert row["minimum"] == 4 * PARAMS
    assert row["bytes"] == 4 * PARAMS + 12


@pytest.mark.parametrize(
    ("reshard", "gathered", "calls"),
    [
        ("never", PARAMS, NUM_LAYERS + 1),
        ("default", PARAMS + (NUM_LAYERS - 1) * BLOCK_PARAMS, 2 * NUM_LAYERS),
        ("always", 2 * PARAMS, 2 * (NUM_LAYERS + 1)),
    ],
)
def test_shards_are_gathered_as_often_as_they_are_freed(reshard: str, gathered: int, calls: int) -> None:
    row = count_busiest(dp_shard=2, reshard=reshard)
    assert sum_sent(row, "all-gather") == (calls, 4 * gathered // 2)
    assert sum_sent(row, "reduce-scatter") == (NUM_LAYERS + 1, 4 * PARAMS // 2)
    embedding_size = VOCAB_SIZE * WIDTH if reshard == "always" else 0  # the embedding's backward reads no weights
    assert row["minimum"] == 4 * (gathered - embedding_size + PARAMS) // 2


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tensor_ranks_send_eight_activations_a_block(sequence_parallel: bool) -> None:
    row = count_busiest(tp=2, sequence_parallel=sequence_parallel)
    loss = 3 * 4 * GLOBAL_BATCH * SEQ_LEN + 4  # bytes of three fp32 numbers per token, and of the norm
    if sequence_parallel:
        calls, size = 4 * NUM_LAYERS + 2, (4 * NUM_LAYERS + 2) * ACTIVATION_BYTES // 2
        assert sum_sent(row, "all-gather") == sum_sent(row, "reduce-scatter") == (calls, size)
        # One all-reduce has the gradients of all norms.
        assert sum_sent(row, "all-reduce") == (1 + 3, 4 * WIDTH * (2 * NUM_LAYERS + 1) + loss)
    else:
        assert sum_sent(row, "all-reduce") == (4 * NUM_LAYERS + 2 + 3, (4 * NUM_LAYERS + 2) * ACTIVATION_BYTES + loss)
    assert row["excess"] < 0.002


def test_stages_send_activations_on_and_their_gradient_back() -> None:
    row = count_busiest(pp=2, micro_batch=2)
    assert sum_sent(row, "send") == (GLOBAL_BATCH // 2, ACTIVATION_BYTES)
    assert sum_sent(row, "all-reduce") == (3, 8 + 4 + 4)
    assert row["minimum"] == ACTIVATION_BYTES


def count_each_kind() -> dict[tuple[str, str], float]:
    """Count one call of each kind on this rank."""
    mesh = init_device_mesh("cpu", (1, 1, 2, 1, 1), mesh_dim_names=AXES)
    group, group_of_one, peer = mesh.get_group("dp_shard"), mesh.get_group("tp"), 1 - dist.get_rank()
    full, half = torch.zeros(10), torch.zeros(5)
    with WireCounter(mesh) as wire:
        dist.all_reduce(full, group=group)
        dist.all_reduce(full, group=group_of_one)
        dist.all_gather_into_tensor(full, half, group=group)
        dist.reduce_scatter_tensor(half, full, group=group)
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, full, peer, group), dist.P2POp(dist.irecv, full.clone(), peer, group)]
        ):
            work.wait()
    assert set(wire.calls.values()) == {1}
    return dict(wire.bytes)


def test_each_kind_sends_as_much_as_a_ring() -> None:
    kinds = {"all-reduce": 40, "all-gather": 20, "reduce-scatter": 20, "send": 40}
    assert get_world(2).run(count_each_kind) == [{("dp_shard", kind): size for kind, size in kinds.items()}] * 2


def count_unknown_kind() -> None:
    """Run a collective that WireCounter does not know."""
    mesh = init_device_mesh("cpu", (1, 1, 2, 1, 1), mesh_dim_names=AXES)
    with WireCounter(mesh):
        dist.broadcast(torch.zeros(1), 0)


def test_an_unknown_call_is_an_error() -> None:
    with pytest.raises(WorldError, match="c10d::broadcast_"):
        get_world(2).run(count_unknown_kind)


def make_rows(excess: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row per case. `excess` is the fraction of bytes above the minimum, by the name of the case."""
    fields = {"ranks": 2, "calls": 1, "bytes": 1, "minimum": 1, "by_axis": []}
    return [{**fields, "layout": case.name, "excess": excess.get(case.name, 0.0)} for case in CASES]


def test_an_excess_needs_a_reason_and_a_reason_an_excess() -> None:
    explained = dict.fromkeys(communication.REASONS, 0.5)
    format_document(make_rows(explained))
    with pytest.raises(SystemExit, match=r"\['tp 2'\]"):
        format_document(make_rows({**explained, "tp 2": 0.051}))
    stale = next(iter(explained))
    with pytest.raises(SystemExit, match=re.escape(stale)):
        format_document(make_rows({**explained, stale: 0.049}))


def test_the_document_has_every_layout() -> None:
    lines = communication.DOCUMENT_FILE.read_text().splitlines()
    table = [
        line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ") and line.endswith("% |")
    ]
    assert table == [case.name for case in CASES]
