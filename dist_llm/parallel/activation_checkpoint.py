"""Activation checkpointing (recompute) and compilation of the transformer blocks.

Both replace the `forward` of a block instead of wrapping the module, so that parameter names stay the same.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from dist_llm.compat import (
    functional_collectives,
    is_traceable_wrapper_subclass,
    pytree,
    saved_by_selective_checkpoint,
    saved_tensors,
    set_activation_memory_budget,
    trace_sizes_from_tensors,
)
from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.models import grouped_linear  # noqa: F401  # registers the operation of SAVED_OPS
from dist_llm.models.decoder import Decoder

RecomputeMode = Literal["none", "selective", "full"]

# Operations whose outputs the selective mode saves, because they are expensive: matrix products, attention kernels, and
# reductions over tensor-parallel ranks. On CPUs these reductions are point-to-point messages and are repeated.
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    functional_collectives.reduce_scatter_tensor.default,
    functional_collectives.all_reduce.default,
    functional_collectives.all_to_all_single.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.dist_llm.grouped_linear.default,  # models/grouped_linear.py
}


def compile_blocks(model: Decoder, parallel: ParallelConfig) -> None:
    """Compile each block separately. All layers then share one graph, and the hooks of FSDP stay outside of it."""
    if parallel.recompute_budget < 1:
        set_activation_memory_budget(parallel.recompute_budget)
    if parallel.ep > 1:
        trace_sizes_from_tensors()
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward)


def checkpoint_blocks(model: Decoder, mode: RecomputeMode, is_compiled: bool) -> None:
    """Set the recompute mode of all blocks. Call this after `compile_blocks`.

    `fit_activation_budget` may later change the modes of single blocks.
    """
    for block in model.blocks.values():
        selective = MethodType(_selective_forward, block)
        block.forward = CheckpointedForward(block.forward, torch.compile(selective) if is_compiled else None, mode)


class CheckpointedForward:
    """The forward of a block, with a recompute mode.

    Mode none saves all activations; full saves only the input of the block; selective saves the input and the outputs
    of `SAVED_OPS`. The argument `selective` is None, or a compiled forward with the selective mode inside its graph. In
    a compiled block, this mode cannot be applied outside the graph, because the compiler replaces the operations of
    `SAVED_OPS` by other kernels.

    While `saved_bytes_log` is a dict, each storage that would be saved is logged there with its bytes, and not saved.
    """

    def __init__(
        self, forward: Callable[..., Tensor], selective: Callable[..., Tensor] | None, mode: RecomputeMode
    ) -> None:
        self.forward, self.selective, self.mode = forward, selective, mode
        self.saved_bytes_log: dict[StorageWeakRef, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        saved_outputs: list[dict[Any, list[Any]]] = []  # outputs that a selective forward saves besides its input

        def create_contexts() -> Any:
            contexts = _selective_contexts()
            saved_outputs.append(saved_by_selective_checkpoint(contexts))
            return contexts

        with nullcontext() if self.saved_bytes_log is None else _log_saved_tensors(self._log_saved):
            if self.mode == "none":
                return self.forward(*args, **kwargs)
            if self.mode == "selective" and self.selective is not None:
                return self.selective(*args, **kwargs)
            context_fn = create_contexts if self.mode == "selective" else noop_context_fn
            output: Tensor = checkpoint(self.forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)
        if self.saved_bytes_log is not None:
            for saved in saved_outputs:
                self._log_saved(saved_tensors(saved))
                saved.clear()
        return output

    def _log_saved(self, saved: Any) -> None:
        """Log the storages of all tensors in `saved`, a pytree."""
        assert self.saved_bytes_log is not None
        for storage in iter_storages(saved):
            self.saved_bytes_log[StorageWeakRef(storage)] = storage.nbytes()


def iter_storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in a pytree.

    A tensor subclass, such as a DTensor or a pending result of a collective, yields the storages of its inner tensors.
    """
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and is_traceable_wrapper_subclass(leaf):
            yield from iter_storages([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


@contextmanager
def _log_saved_tensors(log_saved: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block, call `log_saved` with each tensor that autograd would save for the backward pass."""
    with warnings.catch_warnings(), saved_tensors_hooks(log_saved, _refuse_unpack):
        # torch 2.14 warns that tensors saved by selective checkpointing bypass these hooks, which is intended here.
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        yield


def _refuse_unpack(_: Any) -> Tensor:
    raise AssertionError("backward needs a tensor that was only logged, not saved")


def _selective_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Run the forward of `block` in the selective mode. All layers share one compiled graph of this function."""
    forward = type(block).forward  # `block.forward` is replaced by a CheckpointedForward that calls this function
    output: Tensor = checkpoint(forward, block, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)
    return output


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_save_policy)


def _save_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
