"""The tensor-parallel plan: shard each layer over `tp` by heads, hidden units or vocabulary rows."""

import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from dist_llm.models.block import Block
from dist_llm.models.decoder import Decoder, Head
from dist_llm.parallel import fp8, tensor_parallel
from dist_llm.parallel.tensor_parallel import TensorParallelRegion

# A layer without a rule of its own is replicated over `tp`: its class (key) is replaced by another class (value). A
# column-parallel layer does not communicate, so with a replicated weight it serves as a replicated layer.
REPLICATED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: tensor_parallel.ColumnParallelLinear,
    nn.Embedding: tensor_parallel.ColumnParallelEmbedding,
    nn.LayerNorm: tensor_parallel.ReplicatedLayerNorm,
    nn.RMSNorm: tensor_parallel.ReplicatedRMSNorm,
}


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Shard `model` over the one-dimensional `mesh`.

    Each layer gets the same TensorParallelRegion: the collectives on the activations between the sharded matrices.
    """
    region = TensorParallelRegion(mesh, sequence_parallel)
    for path, module in list(model.named_modules()):
        _parallelize_module(module, path, region)
        if path.endswith(".kernel") and model.config.dropout and not sequence_parallel:
            tensor_parallel.fork_dropout_rng(module, mesh)
    if model.head is not None:
        assert isinstance(model.head, Head)
        _distribute_param(model.head, "bias", Shard(0), region)
        model.head = tensor_parallel.VocabParallelHead(model.head, region)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), (
        "every parameter must be a DTensor: the gradient norm counts replicated parameters only once"
    )


def _parallelize_module(module: nn.Module, path: str, region: TensorParallelRegion) -> None:
    """Replace the class of a layer, shard its parameters, and register the hooks that communicate its inputs.

    The last component of `path`, the path of the module in the model, selects the rule. Modules without a rule do not
    change.
    """
    name = path.split(".")[-1]
    # Attention shards its heads (q, k, v, out), and a feed-forward layer its hidden units (gate, up, down).
    # The head `head.out` and the embedding `tokens` shard their vocabulary rows.
    if name in ("q", "k", "v", "gate", "up") or path == "head.out":
        _convert_layer(tensor_parallel.ColumnParallelLinear, module, region, weight=Shard(0), bias=Shard(0))
    elif name in ("out", "down"):
        _convert_layer(tensor_parallel.RowParallelLinear, module, region, weight=Shard(1), bias=Replicate())
        # The bias is added to the tokens of this rank, so its gradient must be summed over ranks. The parameters in
        # `partial_grad_params` are all-reduced once per step (tensor_parallel.all_reduce_replicated_grads).
        module.partial_grad_params = ("bias",) if region.sequence_parallel else ()  # type: ignore[assignment]
    elif name == "tokens":
        _convert_layer(tensor_parallel.VocabParallelEmbedding, module, region, weight=Shard(0))
    elif name == "table":  # relative position biases: one column per head
        _convert_layer(tensor_parallel.ColumnParallelEmbedding, module, region, weight=Shard(1))
    elif type(module) in REPLICATED_LAYERS:
        _convert_layer(REPLICATED_LAYERS[type(module)], module, region, weight=Replicate(), bias=Replicate())
        has_sharded_heads = name in ("norm_q", "norm_k")
        if region.sequence_parallel or has_sharded_heads:  # a rank normalizes only a part of the tokens or heads
            module.partial_grad_params = ("weight", "bias")  # type: ignore[assignment]
    # Hooks: the matrix products need all tokens. Under sequence parallelism, the layers between them get only the
    # positions or the stochastic-depth scale of the tokens of this rank.
    if name in ("attention", "cross", "feedforward"):
        module.register_forward_pre_hook(region.gather_inputs)
    elif region.sequence_parallel and name in ("embed", "source_embed"):
        module.register_forward_pre_hook(region.shard_positions)
    elif region.sequence_parallel and isinstance(module, Block):
        module.register_forward_pre_hook(region.shard_depth_scale)


def _convert_layer(
    layer_class: type[nn.Module], module: nn.Module, region: TensorParallelRegion, **placements: Placement
) -> None:
    """Change the class of `module` to `layer_class` and distribute the parameters named in `placements`."""
    for name, placement in placements.items():
        _distribute_param(module, name, placement, region)
    if isinstance(module, nn.Linear):
        module.matmul = fp8.float8_linear if isinstance(module, fp8.Float8Linear) else F.linear  # type: ignore[assignment]
    module.__class__, module.region = layer_class, region  # type: ignore[assignment]


def _distribute_param(module: nn.Module, name: str, placement: Placement, region: TensorParallelRegion) -> None:
    if (parameter := getattr(module, name, None)) is not None:
        sharded = distribute_tensor(parameter, region.mesh, (placement,), src_data_rank=None)
        setattr(module, name, nn.Parameter(sharded))
