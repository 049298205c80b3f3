"""On CPUs gathers and reductions are messages from each rank to each other.

gloo makes an all-reduce of a reduce-scatter, which moves twice as much, and its all-gather copies more than it must.
Here a rank sends what it would in a ring, n (p - 1) / p of n bytes over p ranks, each part to where it is wanted.
"""

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dist_llm.models.decoder import Decoder


def uses_p2p(device: str) -> bool:
    """Whether those that compute there send messages."""
    return device == "cpu"


def use_p2p_collectives(model: Decoder, device: str) -> None:
    """Have FSDP do so, if `model` is there; and gather each block's weights while the one before it computes."""
    if not uses_p2p(device):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(P2PAllGather())  # type: ignore[arg-type]  # torch's base classes are not public
            module.set_custom_reduce_scatter(P2PReduceScatter())  # type: ignore[arg-type]
    modules: list[Any] = [model, *model.blocks.values()]
    for one, following in pairwise(modules):
        one.set_modules_to_forward_prefetch([following])


class P2PAllGather:
    """The ranks' inputs, one after another, on all of them; FSDP waits for what this returns.

    The input is this rank's part of the output, as FSDP has it.
    """

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        parts = output_tensor.chunk(group.size())
        assert parts[group.rank()].data_ptr() == input_tensor.data_ptr()
        works = [dist.isend(input_tensor, group=group, group_dst=rank) for rank in _peers(group)]
        works += [dist.irecv(parts[rank], group=group, group_src=rank) for rank in _peers(group)]
        return _WorkList(works)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for an input or an output."""
        return torch.empty(*size, dtype=dtype, device=device)


class P2PReduceScatter:
    """This rank's part of the sum of all inputs, added up in an order that is always the same."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM
        assert group.size() > 1
        parts = input_tensor.chunk(group.size())
        sends = _WorkList([dist.isend(parts[rank], group=group, group_dst=rank) for rank in _peers(group)])
        recv_buffer, total = torch.empty_like(output_tensor), parts[group.rank()]
        for rank in reversed(_peers(group)):  # from whom sends here first, so that all links are busy
            dist.recv(recv_buffer, group=group, group_src=rank)
            total = torch.add(total, recv_buffer, out=output_tensor)
        sends.wait()

    allocate = P2PAllGather.allocate


class _WorkList(dist.Work):
    """Done when all of them are. Each is waited for once: a second wait for a message would not end."""

    def __init__(self, works: Sequence[dist.Work | None]) -> None:
        super().__init__()
        self.works = [work for work in works if work is not None]

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        while self.works:
            self.works.pop(0).wait(timeout)
        return True


def _peers(group: dist.ProcessGroup) -> list[int]:
    """The next rank first."""
    return [(group.rank() + step) % group.size() for step in range(1, group.size())]
