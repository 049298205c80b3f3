"""The DeepSpeed engine (engine: deepspeed): ZeRO 0 to 3 with our model, loss, optimizer, schedule and checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from dist_llm.checkpoint.checkpoint_state import CheckpointState, TorchState, check_moment_names, select_moment_shapes
from dist_llm.checkpoint.flat_shard import FlatShard
from dist_llm.config.deepspeed import build_deepspeed_json
from dist_llm.config.schema import Config
from dist_llm.convert.deepspeed_layout import PartitionLayout, contiguous_layout, per_param_layout
from dist_llm.engines.base import Engine
from dist_llm.engines.data_parallel_engine import DataParallelEngine
from dist_llm.engines.deepspeed_compat import copy_fp32_weights, release_small_weights
from dist_llm.engines.optimizer_step import set_learning_rate
from dist_llm.errors import CheckpointError
from dist_llm.launch.environment import prepare_deepspeed
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.models.decoder import Decoder
from dist_llm.models.init import init_param_
from dist_llm.objectives.batch import Batch
from dist_llm.optim import gradient_clipping
from dist_llm.optim.build_optimizer import build_optimizer
from dist_llm.parallel.parallelize import init_parameters, parallelize_model
from dist_llm.sharded import full_shape


def build_engine(config: Config, device: torch.device) -> Engine:
    """Build the pipeline engine if parallel.pp is above 1, else the data-parallel engine."""
    if config.parallel.pp == 1:
        return DeepSpeedEngine(config, device)
    from dist_llm.engines.deepspeed_pipeline import DeepSpeedPipelineEngine  # a subclass of the class below

    return DeepSpeedPipelineEngine(config, device)


class DeepSpeedEngine(DataParallelEngine):
    """An `Engine` that wraps DeepSpeed's engine. `config` must be resolved, and a process group must exist.

    DeepSpeed averages gradients over ranks, so losses are multiplied by the number of ranks. `update` sets the learning
    rate of each step. The scheduler of DeepSpeed is not used.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        deepspeed = prepare_deepspeed(device)
        self.stage = config.deepspeed.stage
        settings = build_deepspeed_json(config, self.dp_rank_and_size.size)
        self.model = self.build_model_part(deepspeed, settings)
        optimizer = build_optimizer(config.optim, self.model.named_parameters(), build_param_specs(config.model))
        self.deepspeed = self.initialize(deepspeed, self.model, optimizer, settings)
        self.optimizer = getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)
        if self.stage:
            _init_partitions(self.state, config)  # each rank initializes its own fp32 partitions

    def initialize(self, deepspeed: Any, model: Decoder, optimizer: optim.Optimizer, settings: dict[str, Any]) -> Any:
        """Create DeepSpeed's engine object."""
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def build_model_part(self, deepspeed: Any, settings: dict[str, Any]) -> Decoder:
        """Build the model with its initial values.

        At ZeRO 3, DeepSpeed shards each layer when it is built, and `__init__` initializes the shards later.
        """
        config, loss = self.config, CrossEntropy(self.config.loss.label_smoothing, self.config.loss.z_loss)
        if self.stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = build_model(config.model, loss)
            parallelize_model(model, config, None)
            return model
        with torch.device("meta"):
            model = build_model(config.model, loss)
        parallelize_model(model, config, None)
        model.to_empty(device=self.device)
        init_parameters(model, config)
        return model

    @property
    def state(self) -> CheckpointState:
        if self.stage == 0:
            return TorchState(self.model, self.optimizer)
        return ZeroPartitions(
            self.deepspeed.optimizer, dict(self.model.named_parameters()), self.stage, *self.dp_rank_and_size
        )

    def accumulate(self, batches: Sequence[Batch], denominator: Tensor, step: int) -> Tensor:
        self.deepspeed.train()
        losses = []
        for index, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(batches) - 1)
            self.seed_dropout(step, index)
            losses_B = self.deepspeed(batch.inputs_BS, **batch.forward_arguments()) / denominator
            self.deepspeed.backward(losses_B.sum() * self.dp_rank_and_size.size, scale_wrt_gas=False)
            losses.append(losses_B.detach().float())
        return torch.cat(losses)

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        norm = self._unreduced_grad_norm() if self.stage == 0 else None
        if norm is not None and should_apply is not None and not should_apply(norm):
            self.deepspeed.zero_grad()
            return norm
        set_learning_rate(self.deepspeed.optimizer.param_groups, lr)
        self.step()
        if norm is None:
            norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self.device).float()
        return norm

    def step(self) -> None:
        """Clip, step and clear the gradients. From ZeRO 1 on, DeepSpeed skips a step with a non-finite gradient."""
        self.deepspeed.step()
        if self.stage == 3 and self.deepspeed.optimizer.overflow:
            # A step that DeepSpeed skips leaves the small weights gathered.
            release_small_weights(self.deepspeed.optimizer)

    def _unreduced_grad_norm(self) -> Tensor:
        """Return the gradient norm at ZeRO 0, where DeepSpeed does not report one.

        Each rank holds the full gradients after the last backward pass.
        """
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return gradient_clipping.compute_global_norm(grads).to(self.device)

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        self.deepspeed.eval()
        losses_B: Tensor = self.deepspeed(batch.inputs_BS, **batch.forward_arguments())
        return losses_B


class ZeroPartitions:
    """The `CheckpointState` of ZeRO 1 to 3.

    DeepSpeed concatenates the fp32 weights of a parameter group into one flat tensor and partitions it over the ranks.
    It stores the moments in the same way. `weight_partitions` has the partition of this rank of each group, and is also
    the key of its moments in the optimizer state.
    """

    def __init__(
        self, zero_optimizer: Any, parameters: Mapping[str, nn.Parameter], stage: int, dp_rank: int, dp_size: int
    ) -> None:
        self.zero_optimizer, self.stage, self.dp_rank = zero_optimizer, stage, dp_rank
        names = {parameter: name for name, parameter in parameters.items()}
        if stage == 3:
            groups, self.weight_partitions = zero_optimizer.fp16_groups, zero_optimizer.fp32_partitioned_groups_flat
        else:
            groups, self.weight_partitions = zero_optimizer.bit16_groups, zero_optimizer.single_partition_of_fp32_groups
        self.shapes = [{names[parameter]: full_shape(parameter) for parameter in group} for group in groups]
        build_layout = per_param_layout if stage == 3 else contiguous_layout
        self.layouts: list[PartitionLayout] = [build_layout(shapes, dp_size) for shapes in self.shapes]
        for partition, layout in zip(self.weight_partitions, self.layouts, strict=True):
            assert partition.numel() == layout.sizes[dp_rank], "DeepSpeed uses an unknown partition layout"

    @property
    def optimizer(self) -> optim.Optimizer:
        optimizer: optim.Optimizer = self.zero_optimizer.optimizer
        return optimizer

    def weights(self) -> dict[str, Any]:
        return {
            f"model.{name}": shard
            for group_index, partition in enumerate(self.weight_partitions)
            for name, shard in self._iter_shards(group_index, partition.detach())
        }

    def moments(self) -> dict[str, Any]:
        moments: dict[str, Any] = {}
        for group_index, (partition, shapes) in enumerate(zip(self.weight_partitions, self.shapes, strict=True)):
            for key, value in self.optimizer.state.get(partition, {}).items():
                # A value without dimensions, the step counter, belongs to all parameters of the group.
                shards = self._iter_shards(group_index, value) if value.ndim else ((name, value) for name in shapes)
                moments |= {f"optim.{name}.{key}": shard for name, shard in shards}
        return moments

    def allocate_moments(self, saved: Mapping[str, tuple[int, ...]]) -> None:
        for partition, shapes in zip(self.weight_partitions, self.shapes, strict=True):
            shapes_by_param = {name: select_moment_shapes(saved, name) for name in shapes}
            first_name, first_shapes = next(iter(shapes_by_param.items()))
            mismatching = [name for name, moments in shapes_by_param.items() if moments.keys() != first_shapes.keys()]
            if mismatching:
                raise CheckpointError(
                    f"{mismatching[0]} lacks the moments that {first_name} has, but DeepSpeed steps both "
                    "together; start with init_from and init_optimizer: fresh"
                )
            check_moment_names(first_name, first_shapes, self.optimizer.param_groups[0])
            self.optimizer.state[partition] = {
                key: torch.zeros_like(partition, requires_grad=False)
                if shape
                else torch.zeros((), device=partition.device)
                for key, shape in first_shapes.items()
            }

    @torch.no_grad()
    def after_load(self) -> None:
        """Copy the fp32 weights to the weights of the model, which DeepSpeed stores separately in the compute dtype."""
        if self.stage < 3:
            self.zero_optimizer.update_lp_params()
            return
        copy_fp32_weights(self.zero_optimizer, len(self.weight_partitions))

    def _iter_shards(self, group_index: int, values: Tensor) -> Iterator[tuple[str, FlatShard]]:
        """Yield (name, shard of this rank) for each parameter of a group.

        `values` has the layout of the partition of this rank: the fp32 weights or a moment.
        """
        layout = self.layouts[group_index]
        for name, shape in self.shapes[group_index].items():
            slices = layout.slices[name]
            start = sum(elements.stop - elements.start for elements in slices[: self.dp_rank])
            yield name, FlatShard.from_flat(shape, values[slices[self.dp_rank]], start)


def _init_partitions(state: CheckpointState, config: Config) -> None:
    """Initialize the fp32 weights in the partitions of this rank with the values that all engines start from."""
    specs = build_param_specs(config.model)
    for name, shard in state.weights().items():
        name = name.removeprefix("model.")
        for offset, chunk in shard.chunks.items():
            init_param_(chunk, name, specs[name].init, config.run.seed, shard.shape, offset)
    state.after_load()
