"""All-gather and reduce-scatter on CPUs, built from point-to-point messages between all pairs of ranks.

gloo implements reduce-scatter as an all-reduce, which moves twice as many bytes as needed, and the all-gather of gloo
makes extra copies. Here each of p ranks sends (p - 1) / p of the n bytes of a full tensor, as in a ring, but directly
to the ranks that need them.
"""

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from dist_llm.compat import set_sharded_collectives
from dist_llm.models.decoder import Decoder


def uses_p2p(device_type: str) -> bool:
    """Return whether collectives on this device type use point-to-point messages."""
    return device_type == "cpu"


def use_p2p_collectives(model: Decoder, device_type: str) -> None:
    """Make FSDP use point-to-point collectives on CPUs, and prefetch the weights of the next block."""
    if not uses_p2p(device_type):
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            set_sharded_collectives(module, P2PAllGather(), P2PReduceScatter())
    modules: list[Any] = [model, *model.blocks.values()]
    for module, next_module in pairwise(modules):
        module.set_modules_to_forward_prefetch([next_module])


class P2PAllGather:
    """Concatenates the inputs of all ranks on all ranks. The caller waits for the returned work.

    The input must be the part of this rank in the output buffer, as in FSDP.
    """

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        chunks = output_tensor.chunk(group.size())
        assert chunks[group.rank()].data_ptr() == input_tensor.data_ptr()
        works = [dist.isend(input_tensor, group=group, group_dst=rank) for rank in _peers(group)]
        works += [dist.irecv(chunks[rank], group=group, group_src=rank) for rank in _peers(group)]
        return _WorkList(works)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate an input or an output."""
        return torch.empty(*size, dtype=dtype, device=device)


class P2PReduceScatter:
    """Sums the inputs of all ranks and writes the part of this rank to the output. The order of the sum is fixed."""

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
        chunks = input_tensor.chunk(group.size())
        sends = _WorkList([dist.isend(chunks[rank], group=group, group_dst=rank) for rank in _peers(group)])
        recv_buffer, total = torch.empty_like(output_tensor), chunks[group.rank()]
        # A rank sends to the next rank first, so the previous rank is the first one that sends to this rank. To receive
        # in this order keeps all links busy.
        for rank in reversed(_peers(group)):
            dist.recv(recv_buffer, group=group, group_src=rank)
            total = torch.add(total, recv_buffer, out=output_tensor)
        sends.wait()

    allocate = P2PAllGather.allocate


class _WorkList(dist.Work):
    """A work that is complete when all of `works` are complete.

    `wait` waits for each work once, because a second wait for a message never returns.
    """

    def __init__(self, works: Sequence[dist.Work | None]) -> None:
        super().__init__()
        self.works = [work for work in works if work is not None]

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        while self.works:
            self.works.pop(0).wait(timeout)
        return True


def _peers(group: dist.ProcessGroup) -> list[int]:
    """Return the other ranks of the group, the next rank first."""
    return [(group.rank() + distance) % group.size() for distance in range(1, group.size())]
