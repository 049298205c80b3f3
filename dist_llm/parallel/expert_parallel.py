"""Expert parallelism (ep): each rank holds some experts, and tokens are sent to the ranks of the experts they chose.

Experts are on a mesh of their own over all ranks (`mesh.build_expert_mesh`). Within a pipeline stage, each of the
dp_shard x cp x tp ranks routes different tokens. These ranks form groups of ep neighbors. Each group holds all experts,
one part per rank, and FSDP shards each part over the corresponding ranks of all groups. The matrices of an expert are
never split. A rank applies its experts to tokens of all ranks of its group, so expert gradients are summed over ranks,
never averaged.

Shapes: as in `models/token_dispatcher.py`; P ranks of an ep group, Q rows that this rank receives.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_llm.compat import functional_collectives
from dist_llm.models.decoder import Decoder
from dist_llm.models.moe import MoE, invert_permutation, permute_rows
from dist_llm.models.token_dispatcher import DispatchedRows, LocalTokenDispatcher
from dist_llm.parallel.mesh import all_gather, all_reduce, differentiable_collective


def apply_expert_parallel(model: Decoder, mesh: DeviceMesh, expert_mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Shard the experts of all layers over the axis ep of `expert_mesh`, and dispatch their tokens over it."""
    ep_mesh = expert_mesh["ep"]
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = AllToAllTokenDispatcher(mesh, ep_mesh, sequence_parallel)
            for layer in module.experts.grouped_linears():
                for name, parameter in list(layer.named_parameters()):
                    shard = distribute_tensor(parameter, ep_mesh, (Shard(0),), src_data_rank=None)
                    setattr(layer, name, nn.Parameter(shard))


class AllToAllTokenDispatcher(LocalTokenDispatcher):
    """Sends rows to the ranks of their experts, and the outputs back, by all-to-all collectives of uneven sizes.

    The tokens of a sequence are spread over cp and tp. Without sequence_parallel, all tensor-parallel ranks hold the
    same tokens, and each of them routes a slice.
    """

    def __init__(self, mesh: DeviceMesh, ep_mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.ep_group, self.ep_size = ep_mesh.get_group(), ep_mesh.size()
        self.tp_rank, self.tp_size, self.tp_group = mesh.get_local_rank("tp"), mesh["tp"].size(), mesh.get_group("tp")
        self.sequence_groups = [mesh.get_group(axis) for axis in ("cp", "tp") if mesh[axis].size() > 1]
        self.num_sequence_shards = mesh["cp"].size() * self.tp_size
        self.slices_tokens = self.tp_size > 1 and not sequence_parallel

    def shard_tokens(self, x_BSD: Tensor) -> Tensor:
        """Return the tokens that this rank routes, [N, D]."""
        x_ND = x_BSD.flatten(0, 1)
        return differentiable_collective(x_ND, self._slice, self._all_gather) if self.slices_tokens else x_ND

    def gather_tokens(self, y_ND: Tensor, x_BSD: Tensor) -> Tensor:
        """Undo `shard_tokens(x_BSD)` for the outputs: [N, D] -> [B, S, D]."""
        if self.slices_tokens:
            y_ND = differentiable_collective(y_ND, self._all_gather, self._slice)
        return y_ND.view_as(x_BSD)

    def sequence_ids(self, num_tokens: int, num_sequences: int, device: torch.device) -> Tensor:
        """Return the index of the sequence of each token of this rank, [N].

        The tokens of all sequences are concatenated and then split into slices over tp, as in TensorParallelRegion.
        """
        token_ids_N = torch.arange(num_tokens, device=device) + self.tp_rank * num_tokens
        return token_ids_N // (num_tokens * self.tp_size // num_sequences)

    def all_reduce_counts(self, counts_BE: Tensor) -> Tensor:
        """Sum the counts per sequence over the ranks that hold parts of the same sequences."""
        for group in self.sequence_groups:
            # Not `dist.all_reduce`, which works in place: the compiler traces the functional form.
            counts_BE = all_reduce(counts_BE, group)
        return counts_BE

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> DispatchedRows:
        """Send rows, which are sorted by expert, to the ranks of the experts. `counts_E`: rows for each expert."""
        if self.ep_size == 1:
            return super().dispatch(rows_RD, counts_E)
        experts_per_rank = len(counts_E) // self.ep_size
        send_counts_Pe = counts_E.unflatten(0, (self.ep_size, experts_per_rank))
        ones = [1] * self.ep_size
        receive_counts_Pe = all_to_all_rows(send_counts_Pe, ones, ones, self.ep_group)
        # The host waits for the device here, once: all-to-all needs the sizes on the host.
        num_sent, num_received = torch.stack((send_counts_Pe.sum(1), receive_counts_Pe.sum(1))).tolist()
        send = partial(all_to_all_rows, num_sent=num_sent, num_received=num_received, group=self.ep_group)
        send_back = partial(all_to_all_rows, num_sent=num_received, num_received=num_sent, group=self.ep_group)
        # Rows arrive sorted by (rank, expert). The experts need them sorted by (expert, rank).
        expert_ids = torch.arange(experts_per_rank, device=counts_E.device).repeat(self.ep_size)
        expert_ids_Q = expert_ids.repeat_interleave(receive_counts_Pe.flatten(), output_size=sum(num_received))
        order_Q = expert_ids_Q.argsort(stable=True)
        inverse_Q = invert_permutation(order_Q)
        received_QD = differentiable_collective(rows_RD, send, send_back)

        def return_rows(outputs_QD: Tensor) -> Tensor:
            return differentiable_collective(permute_rows(outputs_QD, inverse_Q, order_Q), send_back, send)

        return DispatchedRows(permute_rows(received_QD, order_Q, inverse_Q), receive_counts_Pe.sum(0), return_rows)

    def _slice(self, x_ND: Tensor) -> Tensor:
        return x_ND.chunk(self.tp_size)[self.tp_rank].contiguous()

    def _all_gather(self, x_ND: Tensor) -> Tensor:
        return all_gather(x_ND, self.tp_group)


def all_to_all_rows(x: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the next num_sent[rank] rows of `x` to each rank; return num_received[rank] rows of each rank."""
    if torch.compiler.is_compiling():
        # On torch 2.11 a compiled `dist.all_to_all_single`, which writes in place, gives zero gradients.
        output: Tensor = functional_collectives.wait_tensor(
            functional_collectives.all_to_all_single(x.contiguous(), num_received, num_sent, group.group_name)
        )
        return output
    received = x.new_empty(sum(num_received), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), num_received, num_sent, group=group)
    return received
