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
    FP32_BYTES,
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
KV_WIDTH = WIDTH // MODEL["n_heads"] * MODEL["n_kv_heads"]  # of keys, and of values
# Parameters of q and the output projection, of k and v, of the feed-forward layer and of the two norms.
BLOCK_PARAMS = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH + 3 * WIDTH * MODEL["d_ff"] + 2 * WIDTH
PARAMS = NUM_LAYERS * BLOCK_PARAMS + 2 * VOCAB_SIZE * WIDTH + WIDTH  # and of the embedding, the head and the last norm
ACTIVATION_BYTES = FP32_BYTES * GLOBAL_BATCH * SEQ_LEN * WIDTH
NUM_TOKENS_BYTES = 8  # of the number of valid tokens, an int64
SCALAR_BYTES = FP32_BYTES  # of the loss, and of the norm of the gradients
MESH_SHAPE = tuple(2 if axis == "dp_shard" else 1 for axis in AXES)  # of the tests of WireCounter


def count_busiest(**keys: Any) -> dict[str, Any]:
    """Return the traffic of the rank that sends most on two ranks; `keys` are fields of the case."""
    return select_busiest_rank(get_world(2).run(count_traffic, make_case(**keys)))


def sum_calls_and_bytes(row: dict[str, Any], kind: str) -> tuple[int, int]:
    """Return (calls, sent bytes) of one kind of call, summed over all axes."""
    kind_rows = [kind_row for kind_row in row["by_axis"] if kind_row["kind"] == kind]
    return sum(kind_row["calls"] for kind_row in kind_rows), sum(kind_row["bytes"] for kind_row in kind_rows)


def test_replicas_all_reduce_each_gradient_once() -> None:
    row = count_busiest(dp_replicate=2, micro_batch=2)
    # Over two ranks, an all-reduce sends as many bytes as it reduces. One call has the gradients of each block, one
    # those of all other parameters, one the number of valid tokens, and one the loss.
    scalar_bytes = NUM_TOKENS_BYTES + SCALAR_BYTES
    assert sum_calls_and_bytes(row, "all-reduce") == (NUM_LAYERS + 1 + 2, FP32_BYTES * PARAMS + scalar_bytes)
    assert row["minimum"] == FP32_BYTES * PARAMS
    assert row["bytes"] == FP32_BYTES * PARAMS + scalar_bytes


@pytest.mark.parametrize(
    ("reshard", "gathered_params", "calls"),
    [
        # One call gathers each block, and one all other parameters.
        ("never", PARAMS, NUM_LAYERS + 1),
        # Backward gathers each block but the last again.
        ("default", PARAMS + (NUM_LAYERS - 1) * BLOCK_PARAMS, (NUM_LAYERS + 1) + (NUM_LAYERS - 1)),
        # Backward gathers all parameters again.
        ("always", 2 * PARAMS, 2 * (NUM_LAYERS + 1)),
    ],
)
def test_backward_gathers_the_weights_that_forward_frees(reshard: str, gathered_params: int, calls: int) -> None:
    row = count_busiest(dp_shard=2, reshard=reshard)
    # Of two ranks, each sends its half of what it gathers, and half of what it reduces.
    assert sum_calls_and_bytes(row, "all-gather") == (calls, FP32_BYTES * gathered_params // 2)
    assert sum_calls_and_bytes(row, "reduce-scatter") == (NUM_LAYERS + 1, FP32_BYTES * PARAMS // 2)
    # Backward reads no weights of the embedding, so the minimum has them once.
    embedding_params = VOCAB_SIZE * WIDTH if reshard == "always" else 0
    assert row["minimum"] == FP32_BYTES * (gathered_params - embedding_params + PARAMS) // 2


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_tp_ranks_send_four_activations_per_block(sequence_parallel: bool) -> None:
    """A block has two pairs of matrices, and each pair needs an exchange of the activations in forward and backward.

    An exchange is an all-gather and a reduce-scatter, or an all-reduce. Embedding and head have one more each.
    """
    row = count_busiest(tp=2, sequence_parallel=sequence_parallel)
    num_exchanges = 4 * NUM_LAYERS + 2
    # Three all-reduces have the largest logit of each token, the two sums of the loss of each token, and the gradient
    # norm.
    scalar_calls, scalar_bytes = 3, 3 * FP32_BYTES * GLOBAL_BATCH * SEQ_LEN + SCALAR_BYTES
    if sequence_parallel:
        # Of two ranks, each sends half of a tensor that it gathers or reduces.
        expected = (num_exchanges, num_exchanges * ACTIVATION_BYTES // 2)
        assert sum_calls_and_bytes(row, "all-gather") == sum_calls_and_bytes(row, "reduce-scatter") == expected
        # One more all-reduce has the gradients of the normalization layers: two per block, and the last one.
        norm_grad_bytes = FP32_BYTES * WIDTH * (2 * NUM_LAYERS + 1)
        assert sum_calls_and_bytes(row, "all-reduce") == (1 + scalar_calls, norm_grad_bytes + scalar_bytes)
    else:
        assert sum_calls_and_bytes(row, "all-reduce") == (
            num_exchanges + scalar_calls,
            num_exchanges * ACTIVATION_BYTES + scalar_bytes,
        )
    assert row["bytes"] == row["minimum"] + SCALAR_BYTES, "only the norm of the gradients may exceed the minimum"


def test_pipeline_stages_send_activations_or_their_gradients() -> None:
    micro_batch = 2
    row = count_busiest(pp=2, micro_batch=micro_batch)
    assert sum_calls_and_bytes(row, "send") == (GLOBAL_BATCH // micro_batch, ACTIVATION_BYTES)
    # The number of valid tokens, the loss and the norm of the gradients.
    assert sum_calls_and_bytes(row, "all-reduce") == (3, NUM_TOKENS_BYTES + 2 * SCALAR_BYTES)
    assert row["minimum"] == ACTIVATION_BYTES


def count_bytes_by_kind() -> dict[tuple[str, str], float]:
    """Make one call of each kind on this rank; return its bytes by (axis, kind)."""
    mesh = init_device_mesh("cpu", MESH_SHAPE, mesh_dim_names=AXES)
    group, group_of_one, peer = mesh.get_group("dp_shard"), mesh.get_group("tp"), 1 - dist.get_rank()
    full, half = torch.zeros(10), torch.zeros(5)  # 40 and 20 bytes
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


def test_each_kind_counts_the_bytes_of_a_ring() -> None:
    # Of n = 40 bytes, a rank sends in a ring of p = 2 ranks: n (p - 1) / p, an all-reduce twice that, a message n.
    bytes_by_kind = {"all-reduce": 40, "all-gather": 20, "reduce-scatter": 20, "send": 40}
    expected = {("dp_shard", kind): num_bytes for kind, num_bytes in bytes_by_kind.items()}
    assert get_world(2).run(count_bytes_by_kind) == [expected] * 2


def run_unknown_collective() -> None:
    """Run a collective that WireCounter does not know."""
    mesh = init_device_mesh("cpu", MESH_SHAPE, mesh_dim_names=AXES)
    with WireCounter(mesh):
        dist.broadcast(torch.zeros(1), 0)


def test_an_unknown_call_is_an_error() -> None:
    with pytest.raises(WorldError, match="c10d::broadcast_"):
        get_world(2).run(run_unknown_collective)


def make_rows(excess: dict[str, float]) -> list[dict[str, Any]]:
    """Return a row per case. `excess` is the fraction of bytes above the minimum, by the name of the case."""
    fields = {"ranks": 2, "calls": 1, "bytes": 1, "minimum": 1, "by_axis": []}
    return [{**fields, "layout": case.name, "excess": excess.get(case.name, 0.0)} for case in CASES]


def test_an_excess_needs_a_reason_and_a_reason_an_excess() -> None:
    explained = dict.fromkeys(communication.REASONS, 0.5)
    format_document(make_rows(explained))
    above, below = communication.ALLOWED_EXCESS + 0.001, communication.ALLOWED_EXCESS - 0.001
    with pytest.raises(SystemExit, match=r"\['tp 2'\]"):
        format_document(make_rows({**explained, "tp 2": above}))
    needless = next(iter(explained))
    with pytest.raises(SystemExit, match=re.escape(needless)):
        format_document(make_rows({**explained, needless: below}))


def test_the_document_has_every_layout() -> None:
    lines = communication.DOCUMENT_FILE.read_text().splitlines()
    table = [
        line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ") and line.endswith("% |")
    ]
    assert table == [case.name for case in CASES]
