"""Activation checkpointing and compilation of the blocks, without a wrapper: parameter names stay as they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._functorch import config as functorch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from dist_llm.config.schema import ParallelConfig
from dist_llm.models.decoder import Decoder

# Dear to compute, so kept: matrix products, every kernel of attention, and sums over tensor ranks.
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
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


def recompute_blocks(model: Decoder, parallel: ParallelConfig) -> None:
    """Keep a block's input alone (full), or also what `KEPT_OPS` gave (selective)."""
    contexts: Callable[[], Any] = noop_context_fn
    if parallel.recompute == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE
