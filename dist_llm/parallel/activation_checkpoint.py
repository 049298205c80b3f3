"""Activation checkpointing and compilation of the blocks, without a wrapper: parameter names stay as they are."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from dist_llm.config.schema import ParallelConfig
from dist_llm.models.decoder import Decoder

RecomputeMode = Literal["none", "selective", "full"]

# Dear to compute, so kept: matrix products, every kernel of attention, and sums over tensor ranks (those that are
# collectives; on a CPU they are messages, which are sent again).
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}


def compile_blocks(model: Decoder, parallel: ParallelConfig) -> None:
    """Each block by itself: one graph for all layers, and FSDP's hooks stay outside it."""
    if parallel.recompute_budget < 1:
        functorch.activation_memory_budget = parallel.recompute_budget
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward)


def checkpoint_blocks(model: Decoder, mode: RecomputeMode, compiled: bool) -> None:
    """All blocks alike, after `compile_blocks`; a budget may choose for each anew (`fit_activation_budget`)."""
    for block in model.blocks.values():
        selective = MethodType(_selective_forward, block)
        block.forward = CheckpointedForward(block.forward, torch.compile(selective) if compiled else None, mode)


class CheckpointedForward:
    """A block's forward: keeps all (none), its input alone (full), or also what `KEPT_OPS` gave (selective).

    `selective`: a compiled forward that does so by itself. A compiler has to see the products that are kept; called
    from outside, what it made of them has other names.

    With a `ledger`, what it keeps is written down there, each storage with its bytes, and is not kept.
    """

    def __init__(
        self, forward: Callable[..., Tensor], selective: Callable[..., Tensor] | None, mode: RecomputeMode
    ) -> None:
        self.forward, self.selective, self.mode = forward, selective, mode
        self.saved_bytes_log: dict[StorageWeakRef, int] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs: list[dict[Any, list[Any]]] = []  # of a selective forward: what is kept beside its input

        def contexts() -> Any:
            both = _selective_contexts()
            outputs.append(both[0].storage)
            return both

        with nullcontext() if self.saved_bytes_log is None else _log_saved_tensors(self._log_saved):
            if self.mode == "none":
                return self.forward(*args, **kwargs)
            if self.mode == "selective" and self.selective is not None:
                return self.selective(*args, **kwargs)
            context_fn = contexts if self.mode == "selective" else noop_context_fn
            found: Tensor = checkpoint(self.forward, *args, use_reentrant=False, context_fn=context_fn, **kwargs)
        if self.saved_bytes_log is not None:
            for kept in outputs:
                self._log_saved([getattr(each, "val", None) for each in pytree.tree_leaves(dict(kept))])
                kept.clear()
        return found

    def _log_saved(self, kept: Any) -> None:
        assert self.saved_bytes_log is not None
        for storage in iter_storages(kept):
            self.saved_bytes_log[StorageWeakRef(storage)] = storage.nbytes()


def iter_storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in there; of a DTensor, and of what a collective has not brought yet, the one inside."""
    for each in pytree.tree_leaves(value):
        if isinstance(each, Tensor) and is_traceable_wrapper_subclass(each):
            yield from iter_storages([getattr(each, name) for name in each.__tensor_flatten__()[0]])
        elif isinstance(each, Tensor):
            yield each.untyped_storage()


@contextmanager
def _log_saved_tensors(note: Callable[[Tensor], None]) -> Iterator[None]:
    with warnings.catch_warnings(), saved_tensors_hooks(note, _refuse_unpack):
        # torch 2.14 warns that what selective keeps passes by the hooks, as ever.
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context", FutureWarning)
        yield


def _refuse_unpack(_: Any) -> Tensor:
    raise AssertionError("what was only written down cannot go backward")


def _selective_forward(block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """A function of the block alone, so that all layers have one graph."""
    forward = type(block).forward  # the instance's is what calls this one
    found: Tensor = checkpoint(forward, block, *args, use_reentrant=False, context_fn=_selective_contexts, **kwargs)
    return found


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_save_policy)


def _save_policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE
