"""The tensor-parallel plan: shard each layer over `tp` by heads, hidden units or vocabulary rows.

The plan follows from the logical dimensions of the parameters (`ParamSpec.dims`): q, k, v, gate and up are sharded by
their outputs, out and down by their inputs, the embedding and the head by their vocabulary rows.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dist_llm.models.attention import AttentionKernel
from dist_llm.models.block import Block
from dist_llm.models.decoder import Decoder, Embedding, Head
from dist_llm.models.feedforward import FeedForward
from dist_llm.models.mixer import Mixer
from dist_llm.models.norm import LayerNorm, RMSNorm
from dist_llm.models.positional_encoding import AlibiBias
from dist_llm.parallel import fp8, tensor_parallel
from dist_llm.parallel.context_parallel import ContextParallelAttention
from dist_llm.parallel.tensor_parallel import TensorParallelRegion
from dist_llm.param_spec import ParamSpec, collect_param_specs

EXPERT = "expert"  # parameters with this first dimension are on the mesh of the experts, and not sharded over tp
# A tensor is sharded over `tp` along the first of its dimensions that is listed here; otherwise it is replicated.
SHARDED_DIMS = ("vocab", "heads", "kv_heads", "head_index", "ffn")

# (class of a layer, dimension of its weight that is sharded; None: replicated) -> class that replaces it.
TENSOR_PARALLEL_CLASSES: dict[tuple[type[nn.Module], int | None], type[nn.Module]] = {
    (nn.Linear, 0): tensor_parallel.ColumnParallelLinear,
    (nn.Linear, 1): tensor_parallel.RowParallelLinear,
    (nn.Linear, None): tensor_parallel.ReplicatedLinear,
    (nn.Embedding, 0): tensor_parallel.VocabParallelEmbedding,
    (nn.Embedding, 1): tensor_parallel.ColumnParallelEmbedding,
    (nn.Embedding, None): tensor_parallel.ReplicatedEmbedding,
    (LayerNorm, None): tensor_parallel.ReplicatedLayerNorm,
    (RMSNorm, None): tensor_parallel.ReplicatedRMSNorm,
    (RMSNorm, 0): tensor_parallel.ShardedRMSNorm,
}
LAYER_CLASSES = (nn.Linear, nn.Embedding, LayerNorm, RMSNorm)


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Shard `model` over the one-dimensional `mesh`.

    All layers share one TensorParallelRegion, which has the collectives on the activations between sharded matrices.
    """
    region = TensorParallelRegion(mesh, sequence_parallel)
    specs = collect_param_specs(model)
    for path, module in list(model.named_modules()):
        own_specs = {
            name: spec
            for name, _ in module.named_parameters(recurse=False)
            if (spec := specs[f"{path}.{name}".removeprefix(".")]).dims[0] != EXPERT
        }
        if own_specs:
            _shard_layer(module, own_specs, region)
        _register_hooks(module, region)
        if (
            isinstance(module, AttentionKernel | ContextParallelAttention)
            and model.config.dropout
            and not sequence_parallel
        ):
            tensor_parallel.fork_dropout_rng(module, mesh)
    if model.head is not None:
        assert isinstance(model.head, Head)
        model.head = tensor_parallel.VocabParallelHead(model.head, region)


def sharded_dim(spec: ParamSpec) -> int | None:
    """Return the dimension along which a parameter is sharded over `tp`; None if it is replicated."""
    return next((index for index, dim in enumerate(spec.dims) if dim in SHARDED_DIMS), None)


def _shard_layer(module: nn.Module, specs: Mapping[str, ParamSpec], region: TensorParallelRegion) -> None:
    """Distribute the parameters of a layer, and change its class to one that computes with the local shards."""
    partial_grad_params = []
    for name, spec in specs.items():
        dim = sharded_dim(spec)
        placement = Replicate() if dim is None else Shard(dim)
        parameter = distribute_tensor(getattr(module, name), region.mesh, (placement,), src_data_rank=None)
        setattr(module, name, nn.Parameter(parameter))
        # Under sequence parallelism, a rank applies a replicated parameter to only a part of the tokens. A parameter
        # that `is_partial_under_tp` is always applied to a part of the tokens or heads. Their gradients must be summed
        # over ranks. `tensor_parallel.all_reduce_replicated_grads` does this once per step.
        if dim is None and (region.sequence_parallel or spec.is_partial_under_tp):
            partial_grad_params.append(name)
    module.partial_grad_params = tuple(partial_grad_params)  # type: ignore[assignment]
    layer_class = next((base for base in LAYER_CLASSES if isinstance(module, base)), None)
    if layer_class is None:
        return  # a module that reads its own parameters: a mixer, or the head, which VocabParallelHead replaces
    if isinstance(module, nn.Linear):
        module.linear_fn = fp8.float8_linear if isinstance(module, fp8.Float8Linear) else F.linear  # type: ignore[assignment]
    module.__class__ = TENSOR_PARALLEL_CLASSES[layer_class, sharded_dim(specs["weight"])]
    module.region = region  # type: ignore[assignment]


def _register_hooks(module: nn.Module, region: TensorParallelRegion) -> None:
    """Register the hooks that gather or slice the inputs of a module, and give ALiBi the heads of this rank.

    The matrix products need all tokens. Under sequence parallelism, an embedding gets only the positions of the tokens
    of this rank, and a block only their stochastic-depth scale.
    """
    if isinstance(module, AlibiBias):
        num_heads = module.num_heads // region.tp_size
        module.local_heads = range(region.rank * num_heads, (region.rank + 1) * num_heads)
    if isinstance(module, Mixer | FeedForward):
        module.register_forward_pre_hook(region.gather_inputs)
    elif region.sequence_parallel and isinstance(module, Embedding):
        module.register_forward_pre_hook(region.shard_positions)
    elif region.sequence_parallel and isinstance(module, Block):
        module.register_forward_pre_hook(region.shard_depth_scale)
