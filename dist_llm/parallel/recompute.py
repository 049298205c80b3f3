"""Activation checkpointing and compilation of the blocks, without a wrapper: parameter names stay as they are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dist_llm.config.schema import ParallelConfig
from dist_llm.models.decoder import Decoder

# Dear to compute, so kept: matrix products and every kernel of attention.
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def compile_blocks(model: Decoder, parallel: ParallelConfig) -> None:
    """Each block by itself: one graph for all layers, and FSDP's hooks stay outside it."""
    if parallel.recompute_budget < 1:
        import torch._functorch.config

        torch._functorch.config.activation_memory_budget = parallel.recompute_budget
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def recompute_blocks(model: Decoder, parallel: ParallelConfig) -> None:
    """Keep a block's input alone (full), or also what `KEPT_OPS` gave (selective)."""
    contexts: dict[str, Callable[[], Any]] = {}
    if parallel.recompute == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)  # type: ignore[method-assign]


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE
