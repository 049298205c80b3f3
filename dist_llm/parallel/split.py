"""Tensor parallelism, which layer is split how: heads, hidden units and vocabulary rows over `tp`."""

import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from dist_llm.models.block import Block
from dist_llm.models.decoder import Decoder, Head
from dist_llm.parallel import fp8, tensor
from dist_llm.parallel.tensor import Between

# By what a layer was, where nothing but its parameters changes.
LOCAL: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: tensor.LocalLinear,
    nn.Embedding: tensor.LocalEmbedding,
    nn.LayerNorm: tensor.LocalLayerNorm,
    nn.RMSNorm: tensor.LocalRMSNorm,
}


def tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Split `model` over the one-dimensional `mesh`."""
    between = Between(mesh, sequence_parallel)
    for path, module in list(model.named_modules()):
        _split(module, path, between)
        if path.endswith(".kernel") and model.config.dropout and not sequence_parallel:
            tensor.own_dropout(module, mesh)
    if model.head is not None:
        assert isinstance(model.head, Head)
        _lay_out(model.head, "bias", Shard(0), between)
        model.head = tensor.VocabParallelHead(model.head, between)
    assert all(isinstance(each, DTensor) for each in model.parameters()), "the global norm counts on it"


def _split(module: nn.Module, path: str, between: Between) -> None:
    """One module, by where it is in the model."""
    name = path.split(".")[-1]
    if name in ("q", "k", "v", "gate", "up") or path == "head.out":
        _become(tensor.LocalLinear, module, between, weight=Shard(0), bias=Shard(0))
    elif name in ("out", "down"):
        _become(tensor.RowLinear, module, between, weight=Shard(1), bias=Replicate())
        module.summed = ("bias",) if between.sliced else ()  # type: ignore[assignment]
    elif name == "tokens":
        _become(tensor.RowEmbedding, module, between, weight=Shard(0))
    elif name == "table":  # of relative positions: a column per head
        _become(tensor.LocalEmbedding, module, between, weight=Shard(1))
    elif type(module) in LOCAL:
        _become(LOCAL[type(module)], module, between, weight=Replicate(), bias=Replicate())
        if between.sliced or name in ("norm_q", "norm_k"):  # a rank has but some of the tokens, or of the heads
            module.summed = ("weight", "bias")  # type: ignore[assignment]
    if name in ("attention", "cross", "feedforward"):
        module.register_forward_pre_hook(between.join_inputs)
    elif between.sliced and name in ("embed", "source_embed"):
        module.register_forward_pre_hook(between.share_positions)
    elif between.sliced and isinstance(module, Block):
        module.register_forward_pre_hook(between.share_survivors)


def _become(kind: type[nn.Module], module: nn.Module, between: Between, **placements: Placement) -> None:
    """`module` is a `kind` from now on, with its parameters laid out."""
    for name, placement in placements.items():
        _lay_out(module, name, placement, between)
    if isinstance(module, nn.Linear):
        module.product = fp8.linear if isinstance(module, fp8.Float8Linear) else F.linear  # type: ignore[assignment]
    module.__class__, module.between = kind, between  # type: ignore[assignment]


def _lay_out(module: nn.Module, name: str, placement: Placement, between: Between) -> None:
    if (whole := getattr(module, name, None)) is not None:
        part = distribute_tensor(whole, between.mesh, (placement,), src_data_rank=None)
        setattr(module, name, nn.Parameter(part))
