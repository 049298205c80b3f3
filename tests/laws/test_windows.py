"""Sliding windows under context parallelism, without a dense mask and with the keys that the windows reach.

The attention of all ranks together equals attention over the full sequence with a dense mask, and models with windows
compute the steps of one process. window_bugs.py has planted bugs.
"""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.models.attention import AttentionKernel, materialize_mask
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.softmax_attention import dense_attention
from dist_llm.objectives.batch import Batch
from dist_llm.parallel import halo_exchange
from dist_llm.parallel.context_parallel import ContextParallelAttention, shard_sequences
from dist_llm.parallel.halo_exchange import chunks_of_rank, exchange_halos
from dist_llm.parallel.mesh import all_to_all_rows
from tests.laws.law import assert_matches_one_process
from tests.laws.layouts import CLIPPED_SGD, DOCUMENTS, SGD, WINDOWS, Layout, index_by_name
from tests.laws.worlds import get_world

CPU = torch.device("cpu")
B, H, K, E = 2, 4, 2, 4  # sequences, query heads, key-value heads, head dimension


@dataclass(frozen=True)
class Sequences:
    """Random sequences of S tokens, and the window of their attention."""

    S: int
    window: int
    with_documents: bool = False
    with_sinks: bool = False

    def draw(self) -> list[Tensor]:
        """Return queries, keys, values, a weight of each output, and sinks, all in fp64."""
        generator = torch.Generator().manual_seed(self.window)
        shapes = [(B, self.S, heads, E) for heads in (H, K, K, H)] + [(H,)]
        return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]

    def make_mask(self) -> AttentionMask:
        """Return the mask of the full sequences. Documents start within chunks and at their first tokens."""
        if not self.with_documents:
            return replace(CAUSAL, window=self.window)
        starts = torch.zeros(B, self.S, dtype=torch.int64)
        starts[0, [5, self.S // 4, self.S // 2 + 1]] = 1
        starts[1, [self.S // 2 - 1, self.S // 2, self.S - 2]] = 1
        return replace(CAUSAL, window=self.window, documents_BT=starts.cumsum(1))


def attend_densely(sequences: Sequences) -> list[Tensor]:
    """Return the outputs and the gradients of queries, keys, values and sinks with a dense mask of S x S."""
    q, k, v, weights, sinks = sequences.draw()
    rows, S = torch.arange(B)[:, None, None], torch.arange(sequences.S)
    allowed = sequences.make_mask().allows(sequences.S, sequences.S, rows, S[None, :, None], S).expand(B, -1, -1)
    heads = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    out = dense_attention(*heads, allowed[:, None], 0.0, None, None, sinks if sequences.with_sinks else None)
    return differentiate(out.transpose(1, 2), weights, (q, k, v, sinks))


def attend_on_rank(sequences: Sequences) -> list[Tensor]:
    """Return what `attend_densely` does for the tokens of this rank. Sinks have the gradient of these tokens."""
    rank, size = dist.get_rank(), dist.get_world_size()
    q, k, v, weights, sinks = sequences.draw()
    tokens = select_tokens(sequences.S, rank, size)
    q, k, v = (tensor[:, tokens].detach().requires_grad_() for tensor in (q, k, v))
    kernel = ContextParallelAttention(AttentionKernel(0.0, E**-0.5), init_device_mesh("cpu", (size,)))
    mask = materialize_mask(shard_mask(sequences, rank, size), (B, len(tokens), sequences.S), CPU, dense=False)
    assert mask.materialized is None
    out = kernel(q, k, v, mask, sinks if sequences.with_sinks else None)
    return differentiate(out, weights[:, tokens].detach(), (q, k, v, sinks))


def differentiate(out: Tensor, weights: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the outputs, and the gradients of their weighted sum."""
    grads = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def shard_mask(sequences: Sequences, rank: int, size: int) -> AttentionMask:
    """Return the mask of a context-parallel rank."""
    tokens = torch.zeros(B, sequences.S, dtype=torch.int64)
    return shard_sequences(Batch.build(tokens, tokens, sequences.make_mask()), rank, size).mask


def select_tokens(S: int, rank: int, size: int) -> Tensor:
    """Return the positions of the tokens of a rank."""
    chunks = torch.arange(S).chunk(2 * size)
    return torch.cat([chunks[chunk] for chunk in chunks_of_rank(rank, size)])


@pytest.mark.parametrize("with_documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 10, 16, 17, 18, 31, 33, 60, 63])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_a_dense_mask(ranks: int, window: int, with_documents: bool) -> None:
    """Of 64 tokens, a chunk has 16 or 8, and the part of a rank has 32 or 16. Even windows have sinks."""
    sequences = Sequences(64, window, with_documents, with_sinks=window % 2 == 0)
    expected = attend_densely(sequences)
    by_rank = get_world(ranks).run(attend_on_rank, sequences)
    for rank, actual in enumerate(by_rank):
        tokens = select_tokens(sequences.S, rank, ranks)
        for tensor, full in zip(actual[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(tensor, full[:, tokens], rtol=1e-12, atol=1e-12)
    grad_sinks = torch.stack([actual[-1] for actual in by_rank]).sum(0)
    torch.testing.assert_close(grad_sinks, expected[-1], rtol=1e-12, atol=1e-12)


def test_the_comparison_finds_a_window_of_another_length() -> None:
    """The negative control: one key more or less changes outputs far more than the tolerance."""
    outputs = [attend_densely(Sequences(64, 8))[0], attend_densely(Sequences(64, 63))[0]]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def drop_weights_on_rank() -> tuple[Tensor, Tensor]:
    """Return the output of this rank, and its values, for a window of one token and a dropout of a half."""
    size = dist.get_world_size()
    q, k, v = (torch.randn(B, 32, H, E, dtype=torch.float64) for _ in range(3))
    kernel = ContextParallelAttention(AttentionKernel(0.5, E**-0.5), init_device_mesh("cpu", (size,))).train()
    mask = replace(CAUSAL.with_query_positions(torch.zeros(B, 32), 32 * size), window=1)
    return kernel(q, k, v, mask), v


def test_dropout_drops_the_weights_of_a_window() -> None:
    """A query attends to itself with weight 1, so its output is 0 or 2 times its value."""
    for out, values in get_world(2).run(drop_weights_on_rank):
        is_dropped = out.eq(0).all(-1)
        assert 0.3 < is_dropped.double().mean() < 0.7
        torch.testing.assert_close(out[~is_dropped], 2 * values[~is_dropped], rtol=1e-12, atol=1e-12)


class LargestMask(TorchDispatchMode):
    """Records the number of elements of the largest boolean tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bool:
            self.num_elements = max(self.num_elements, result.numel())
        return result


def measure_largest_mask(sequences: Sequences, allow_bands: bool) -> int:
    """Return the number of elements of the largest mask of a forward and backward pass on this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    num_tokens = sequences.S // size
    inputs = [torch.randn(B, num_tokens, heads, E, requires_grad=True) for heads in (H, K, K)]
    kernel = ContextParallelAttention(AttentionKernel(0.0, E**-0.5), init_device_mesh("cpu", (size,)))
    with LargestMask() as largest:
        mask = shard_mask(sequences, rank, size)
        mask = materialize_mask(mask, (B, num_tokens, sequences.S), CPU, dense=False, allow_bands=allow_bands)
        kernel(*inputs, mask).sum().backward()
    return largest.num_elements


@pytest.mark.parametrize("with_documents", [False, True], ids=["", "documents"])
def test_no_mask_has_an_element_for_each_query_and_each_key(with_documents: bool) -> None:
    """Masks grow with the window and not with the sequence: a chunk has blocks of 32 queries and 32 + 15 keys."""
    for S in (512, 1024):
        sequences = Sequences(S, 16, with_documents)
        for num_elements in get_world(2).run(measure_largest_mask, sequences, allow_bands=True):
            assert num_elements <= B * S // 4 * (32 + 15)
        for num_elements in get_world(2).run(measure_largest_mask, sequences, allow_bands=False):
            assert num_elements == B * S // 2 * S, "the negative control: a dense mask"


def count_exchanged_tokens(S: int, window: int) -> tuple[int, int]:
    """Return how many tokens this rank sends and receives in a halo exchange."""
    counts = []

    def count(x: Tensor, num_sent: list[int], num_received: list[int], group: Any) -> Tensor:
        assert len(x) == sum(num_sent)
        counts.append((sum(num_sent), sum(num_received)))
        return all_to_all_rows(x, num_sent, num_received, group)

    assert dist.group.WORLD is not None
    with patch.object(halo_exchange, "all_to_all_rows", count):
        chunks = exchange_halos(torch.arange(S // dist.get_world_size()), window, dist.group.WORLD)
    chunk_tokens = S // dist.get_world_size() // 2
    numbers = chunks_of_rank(dist.get_rank(), dist.get_world_size())
    assert [len(chunk) for chunk in chunks] == [
        chunk_tokens + min(window - 1, number * chunk_tokens) for number in numbers
    ]
    return counts[0]


@pytest.mark.parametrize("window", [1, 2, 9, 17, 40, 63])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_receives_no_more_tokens_than_its_windows_reach(ranks: int, window: int) -> None:
    """At most the W - 1 tokens before each of its chunks, and never more than an all-gather."""
    counts = get_world(ranks).run(count_exchanged_tokens, 64, window)
    assert sum(sent for sent, _ in counts) == sum(received for _, received in counts)
    assert max(max(pair) for pair in counts) <= min(2 * (window - 1), 64 - 64 // ranks)
    if window - 1 <= 64 // ranks // 2:  # the halo of a chunk is in the chunk before it
        ends = [(window - 1, window - 1)] * 2  # the first rank has the ends of sequences, the last rank their middle
        assert counts == [ends[0], *[(2 * (window - 1), 2 * (window - 1))] * (ranks - 2), ends[1]]


LAYOUTS = index_by_name(
    Layout(ranks=2, parallel={"cp": 2}, model="windows"),
    Layout(ranks=2, parallel={"cp": 2}, model="windows", micro_batch=8, sections=DOCUMENTS),
    Layout(ranks=4, parallel={"cp": 4}, model="windows", sections=DOCUMENTS),
    Layout(ranks=4, parallel={"dp_shard": 2, "cp": 2}, model="windows", micro_batch=4),
    Layout(ranks=4, parallel={"cp": 2, "tp": 2}, model="windows", micro_batch=8, sections=DOCUMENTS),
    Layout(ranks=4, parallel={"cp": 2, "tp": 2, "sequence_parallel": False}, model="windows"),
    Layout(ranks=4, parallel={"pp": 2, "cp": 2, "pp_schedule": "zbv"}, model="windows", micro_batch=6),
)
CP4 = Layout(ranks=4, parallel={"cp": 4}, model="windows", sections=DOCUMENTS)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_computes_the_step_of_one_process(layout: Layout) -> None:
    assert_matches_one_process(layout, optim=CLIPPED_SGD, steps=2)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_does_not_change_the_step(recompute: str) -> None:
    assert_matches_one_process(CP4, optim=SGD, steps=2, parallel={"recompute": recompute})


# The compiler needs half a minute for each kind of layers.
LONG_WINDOWS = {"n_layers": 1, "layers": ["long"], "kinds": {"long": WINDOWS["kinds"]["long"]}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(ranks=2, parallel={"cp": 2}, model="windows", sections=DOCUMENTS),
        Layout(ranks=2, parallel={"cp": 2, "recompute": "full"}, model="windows"),
        Layout(ranks=2, parallel={"cp": 2, "recompute": "selective"}, model="windows"),
        CP4,
    ],
    ids=str,
)
def test_compilation_does_not_change_the_step(layout: Layout) -> None:
    assert_matches_one_process(layout, optim=SGD, steps=2, compile=True, model=LONG_WINDOWS)
