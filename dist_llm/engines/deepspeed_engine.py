"""The DeepSpeed engine: ZeRO 0 to 3 with our model, loss, optimizer, schedule and checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim

from dist_llm.checkpoint.checkpoint_state import CheckpointState, TorchState, check_moment_names, moment_shapes
from dist_llm.checkpoint.flat_shard import FlatShard
from dist_llm.config.deepspeed import deepspeed_json
from dist_llm.config.schema import Config
from dist_llm.convert.deepspeed_layout import PartitionLayout, contiguous_layout, per_param_layout
from dist_llm.engines.base import Engine
from dist_llm.engines.data_parallel import DataParallelEngine
from dist_llm.engines.deepspeed_compat import copy_fp32_weights, release_small_weights
from dist_llm.errors import CheckpointError
from dist_llm.launch.environment import prepare_deepspeed
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.build_model import build_model
from dist_llm.models.decoder import Decoder
from dist_llm.models.init import get_init_rule, init_param_
from dist_llm.objectives.batch import Batch
from dist_llm.optim import gradient_clipping
from dist_llm.optim.build_optimizer import build_optimizer
from dist_llm.parallel.parallelize import init_parameters, parallelize_model
from dist_llm.sharded import full_shape


def build_engine(config: Config, device: torch.device) -> Engine:
    """Build the engine for the layout: with a pipeline or without."""
    if config.parallel.pp == 1:
        return DeepSpeedEngine(config, device)
    from dist_llm.engines.deepspeed_pipeline import DeepSpeedPipelineEngine  # a subclass of the class below

    return DeepSpeedPipelineEngine(config, device)


class DeepSpeedEngine(DataParallelEngine):
    """See `Engine`. `config` is resolved. A process group exists, even with one rank.

    DeepSpeed averages gradients over ranks, so losses are multiplied by the number of ranks. The learning rate is set
    before each step; DeepSpeed has no scheduler.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        deepspeed = prepare_deepspeed(device)
        self.stage = config.deepspeed.stage
        settings = deepspeed_json(config, self.dp_rank_and_size[1])
        self.model = self.build_model_part(deepspeed, settings)
        optimizer = build_optimizer(config.optim, self.model.named_parameters())
        self.deepspeed = self.initialize(deepspeed, self.model, optimizer, settings)
        self.optimizer = getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)
        if self.stage:
            _init_partitions(self.state, config)  # each rank initializes its own fp32 partitions

    def initialize(self, deepspeed: Any, model: Decoder, optimizer: optim.Optimizer, settings: dict[str, Any]) -> Any:
        """Create DeepSpeed's engine."""
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def build_model_part(self, deepspeed: Any, settings: dict[str, Any]) -> Decoder:
        """Build the full model with its initial values. At stage 3 no rank ever holds all of it."""
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

    def accumulate(self, batches: Sequence[Batch], num_valid_tokens: Tensor, step: int) -> Tensor:
        self.deepspeed.train()
        num_valid_tokens, losses = num_valid_tokens.clamp(min=1), []
        for number, batch in enumerate(batches):
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
            self.seed_dropout(step, number)
            losses_B = self.deepspeed(batch.inputs_BS, **batch.forward_arguments()) / num_valid_tokens
            self.deepspeed.backward(losses_B.sum() * self.dp_rank_and_size[1], scale_wrt_gas=False)
            losses.append(losses_B.detach().float())
        return torch.cat(losses)

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        norm = self._unreduced_grad_norm() if self.stage == 0 else None
        if norm is not None and should_apply is not None and not should_apply(norm):
            self.deepspeed.zero_grad()
            return norm
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.step()
        if norm is None:
            norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self.device).float()
        return norm

    def step(self) -> None:
        """Clip, step and clear the gradients.

        At stage 1 and above DeepSpeed skips a step with a non-finite gradient.
        """
        self.deepspeed.step()
        if self.stage == 3 and self.deepspeed.optimizer.overflow:
            # a skipped step omits this too, and small weights would stay gathered
            release_small_weights(self.deepspeed.optimizer)

    def _unreduced_grad_norm(self) -> Tensor:
        """Return the gradient norm at stage 0. DeepSpeed reports none there; gradients are full after the last
        backward."""
        return gradient_clipping.global_norm([p.grad for p in self.model.parameters() if p.grad is not None]).to(
            self.device
        )

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        self.deepspeed.eval()
        losses_B: Tensor = self.deepspeed(batch.inputs_BS, **batch.forward_arguments())
        return losses_B


class ZeroPartitions:
    """`CheckpointState` of ZeRO 1 to 3. fp32 weights and moments are one flat, partitioned tensor per group."""

    def __init__(self, zero: Any, parameters: Mapping[str, nn.Parameter], stage: int, rank: int, ranks: int) -> None:
        self.zero, self.stage, self.rank = zero, stage, rank
        names = {parameter: name for name, parameter in parameters.items()}
        groups = zero.fp16_groups if stage == 3 else zero.bit16_groups
        self.flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        self.shapes = [{names[p]: full_shape(p) for p in group} for group in groups]
        lay = per_param_layout if stage == 3 else contiguous_layout
        self.layouts: list[PartitionLayout] = [lay(shapes, ranks) for shapes in self.shapes]
        for flat, layout in zip(self.flats, self.layouts, strict=True):
            assert flat.numel() == layout.sizes[rank], "DeepSpeed uses an unknown partition layout"

    @property
    def optimizer(self) -> optim.Optimizer:
        optimizer: optim.Optimizer = self.zero.optimizer
        return optimizer

    def weights(self) -> dict[str, Any]:
        return {f"model.{name}": boxes for flat in self.flats for name, boxes in self._boxes_of(flat, flat.detach())}

    def moments(self) -> dict[str, Any]:
        moments: dict[str, Any] = {}
        for flat, shapes in zip(self.flats, self.shapes, strict=True):
            for key, value in self.optimizer.state.get(flat, {}).items():
                named = self._boxes_of(flat, value) if value.ndim else ((name, value) for name in shapes)
                moments |= {f"optim.{name}.{key}": moment for name, moment in named}
        return moments

    def allocate_moments(self, saved: Mapping[str, tuple[int, ...]]) -> None:
        for flat, shapes in zip(self.flats, self.shapes, strict=True):
            kinds = {name: moment_shapes(saved, name) for name in shapes}
            first = next(iter(kinds.values()))
            if mismatching := [name for name, kind in kinds.items() if kind.keys() != first.keys()]:
                raise CheckpointError(
                    f"{mismatching[0]} lacks the moments that {next(iter(kinds))} has, but DeepSpeed steps both "
                    "together; start with init_from and init_optimizer: fresh"
                )
            check_moment_names(next(iter(kinds)), first, self.optimizer.param_groups[0])
            self.optimizer.state[flat] = {
                key: torch.zeros_like(flat, requires_grad=False) if shape else torch.zeros((), device=flat.device)
                for key, shape in first.items()
            }

    @torch.no_grad()
    def after_load(self) -> None:
        """Update the model's weights, which DeepSpeed stores beside the fp32 weights in the model's dtype."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        copy_fp32_weights(self.zero, len(self.flats))

    def _boxes_of(self, flat: Tensor, values: Tensor) -> Iterator[tuple[str, FlatShard]]:
        """Yield (name, this rank's part of `values`) for each parameter of a group.

        `values` has the layout of `flat`.
        """
        index = next(index for index, other in enumerate(self.flats) if other is flat)
        layout = self.layouts[index]
        for name, shape in self.shapes[index].items():
            slices = layout.slices[name]
            start = sum(part.stop - part.start for part in slices[: self.rank])
            yield name, FlatShard.from_flat(shape, values[slices[self.rank]], start)


def _init_partitions(state: CheckpointState, config: Config) -> None:
    """Initialize the partitions, each rank its own."""
    for name, boxes in state.weights().items():
        name = name.removeprefix("model.")
        rule = get_init_rule(name, boxes.shape, config.model)
        for offset, box in boxes.chunks.items():
            init_param_(box, name, rule, config.run.seed, boxes.shape, offset)
    state.after_load()
