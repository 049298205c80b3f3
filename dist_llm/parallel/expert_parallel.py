"""Expert parallelism (ep): each rank holds some experts, and tokens are sent to the ranks of the experts they chose.

Experts are on a mesh of their own over all ranks (`mesh.build_expert_mesh`). Within a pipeline stage, each of the
dp_shard x cp x tp ranks routes different tokens. These ranks form groups of ep neighbors. Each group holds all experts,
one part per rank, and FSDP shards each part over the corresponding ranks of all groups. The matrices of an expert are
never split. A rank applies its experts to tokens of all ranks of its group, so expert gradients are summed over ranks,
never averaged.

Shapes: as in `models/token_dispatcher.py`; P ranks of an ep group, Q rows that this rank receives.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.models.decoder import Decoder
from dist_llm.models.moe import MoE, invert_permutation, permute_rows
from dist_llm.models.token_dispatcher import DispatchedRows, LocalTokenDispatcher
from dist_llm.parallel.mesh import all_gather, all_reduce, all_to_all_rows, differentiable_collective


def apply_expert_parallel(model: Decoder, mesh: DeviceMesh, expert_mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Shard the experts of all layers over the axis ep of `expert_mesh`, and dispatch their tokens over it."""
    ep_mesh = expert_mesh["ep"]
    dispatcher_class = PaddedTokenDispatcher if parallel.ep_dispatch == "padded" else AllToAllTokenDispatcher
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = dispatcher_class(mesh, ep_mesh, parallel.sequence_parallel, module.moe.top_k)
            for layer in module.experts.grouped_linears():
                for name, parameter in list(layer.named_parameters()):
                    shard = distribute_tensor(parameter, ep_mesh, (Shard(0),), src_data_rank=None)
                    setattr(layer, name, nn.Parameter(shard))


class AllToAllTokenDispatcher(LocalTokenDispatcher):
    """Sends rows to the ranks of their experts, and the outputs back, by all-to-all collectives of uneven sizes.

    The tokens of a sequence are spread over cp and tp. Without sequence_parallel, all tensor-parallel ranks hold the
    same tokens, and each of them routes a slice.
    """

    def __init__(self, mesh: DeviceMesh, ep_mesh: DeviceMesh, sequence_parallel: bool, top_k: int) -> None:
        self.top_k = top_k
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


class PaddedTokenDispatcher(AllToAllTokenDispatcher):
    """Sends every rank as many slots as it can need at most, so the host need not wait for the numbers of rows.

    Slots without a row are 0. The laws run this dispatcher on CPUs. It has not run on a GPU, which it is meant for.

    Shapes: L slots for the rows between two ranks, J = P * L slots of a rank.
    """

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> DispatchedRows:
        """Send rows, which are sorted by expert, to the ranks of the experts. `counts_E`: rows for each expert."""
        if self.ep_size == 1:
            return super().dispatch(rows_RD, counts_E)
        send_counts_Pe = counts_E.unflatten(0, (self.ep_size, -1))
        receive_counts_Pe = self._exchange(send_counts_Pe)
        experts_per_rank = send_counts_Pe.shape[1]
        # A token has a row for each of its top_k experts, of which at most experts_per_rank are on one rank.
        num_slots = len(rows_RD) // self.top_k * min(self.top_k, experts_per_rank)
        to_slots, from_slots = _slot_functions(send_counts_Pe.sum(1), len(rows_RD), num_slots)
        experts_J = _expert_of_slot(receive_counts_Pe, num_slots)
        order_J = experts_J.argsort(stable=True)  # by expert; slots without a row are last
        inverse_J = invert_permutation(order_J)

        def return_rows(outputs_JD: Tensor) -> Tensor:
            outputs_JD = permute_rows(outputs_JD, inverse_J, order_J)
            returned_JD = differentiable_collective(outputs_JD, self._exchange, self._exchange)
            return differentiable_collective(returned_JD, from_slots, to_slots)

        slots_JD = differentiable_collective(rows_RD, to_slots, from_slots)
        received_JD = differentiable_collective(slots_JD, self._exchange, self._exchange)
        # Grouped products leave the outputs and the gradients of slots without a row uninitialized. Nothing reads them:
        # `from_slots` selects the slots with a row, in forward for the outputs and in backward for the gradients.
        received_JD = permute_rows(received_JD, order_J, inverse_J)
        return DispatchedRows(received_JD, receive_counts_Pe.sum(0), return_rows)

    def _exchange(self, x: Tensor) -> Tensor:
        """Send an equal part of the rows of `x` to each rank of the group."""
        sizes = [len(x) // self.ep_size] * self.ep_size
        return all_to_all_rows(x, sizes, sizes, self.ep_group)


def _slot_functions(
    counts_P: Tensor, num_rows: int, num_slots: int
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return the functions that copy rows into the slots for their ranks, [R, D] -> [J, D], and back.

    `counts_P` are the rows for each rank. Each function is the gradient of the other.
    """
    rows_R = torch.arange(num_rows, device=counts_P.device)
    ends_P = counts_P.cumsum(0)
    ranks_R = torch.searchsorted(ends_P, rows_R, right=True)
    slots_R = ranks_R * num_slots + rows_R - (ends_P - counts_P)[ranks_R]
    return partial(_scatter_rows, slots_R, num_slots * len(counts_P)), partial(_select_rows, slots_R)


def _scatter_rows(slots_R: Tensor, total_slots: int, rows_RD: Tensor) -> Tensor:
    return rows_RD.new_zeros(total_slots, rows_RD.shape[1]).index_copy(0, slots_R, rows_RD)


def _select_rows(slots_R: Tensor, slots_JD: Tensor) -> Tensor:
    return slots_JD[slots_R]


def _expert_of_slot(counts_Pe: Tensor, num_slots: int) -> Tensor:
    """Return the expert of each slot, [J]; e for a slot without a row. The rows of a rank are sorted by expert."""
    slots_L = torch.arange(num_slots, device=counts_Pe.device)
    ends_Pe = counts_Pe.cumsum(1)
    return (slots_L[None, :, None] >= ends_Pe[:, None, :]).sum(-1).flatten()
