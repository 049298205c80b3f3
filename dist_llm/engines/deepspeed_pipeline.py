"""The DeepSpeed engine with pipeline parallelism: DeepSpeed's schedule and communication, and ZeRO 1 on each stage.

The model is split into the same stages as in the native engine. DeepSpeed would run a full step in one call. Here
`accumulate` runs forward and backward of all microbatches and reduces the gradients. `update` then sets the learning
rate and runs the optimizer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from dist_llm.config.schema import Config
from dist_llm.engines.base import DataParallelRank
from dist_llm.engines.deepspeed_compat import postpone_optimizer_step, run_optimizer_step
from dist_llm.engines.deepspeed_engine import DeepSpeedEngine
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.build_model import build_model
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.parallelize import init_parameters, parallelize_model
from dist_llm.parallel.pipeline_parallel import split_layers


class DeepSpeedPipelineEngine(DeepSpeedEngine):
    """An `Engine` with a pipeline. Ranks are ordered as in the native mesh: data-parallel ranks are innermost."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.num_stages = config.parallel.pp
        self.stage_index = dist.get_rank() // (dist.get_world_size() // self.num_stages)
        self.is_last_stage = self.stage_index == self.num_stages - 1
        self.denominator, self.loss_factor = torch.ones((), device=device), 1.0
        self.losses: list[Tensor] = []
        super().__init__(config, device)
        postpone_optimizer_step(self.deepspeed)  # `update` runs the step, once it knows the learning rate

    @property
    def dp_rank_and_size(self) -> DataParallelRank:
        dp_size = dist.get_world_size() // self.num_stages
        return DataParallelRank(dist.get_rank() % dp_size, dp_size)

    @property
    def replica_process_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self.deepspeed.grid.get_data_parallel_group()
        return group

    @property
    def coordinates(self) -> tuple[int, ...]:
        return self.stage_index, 0, self.dp_rank_and_size.rank, 0

    def all_reduce_over_dp_and_cp(self, value: Tensor | float) -> Tensor:
        return super().all_reduce_over_dp_and_cp(value * self.is_last_stage)  # only the last stage has losses

    def build_model_part(self, deepspeed: Any, settings: dict[str, Any]) -> Decoder:
        """Build the pipeline stage of this rank."""
        config, stage = self.config, self.stage_index
        with torch.device("meta"):
            model_part = build_model(config.model, CrossEntropy(config.loss.label_smoothing, config.loss.z_loss))
        layers = split_layers(config.model, self.num_stages, config.parallel.pp_split)[stage]
        model_part.trim_to_stage(layers, is_first=stage == 0, is_last=self.is_last_stage)
        parallelize_model(model_part, config, None)
        model_part.to_empty(device=self.device)
        init_parameters(model_part, config)
        return model_part

    def initialize(self, deepspeed: Any, model: Decoder, optimizer: optim.Optimizer, settings: dict[str, Any]) -> Any:
        # DeepSpeed only builds the stage of this rank. The placeholders of other stages are never run.
        layers = [model if index == self.stage_index else nn.Identity() for index in range(self.num_stages)]
        module = deepspeed.PipelineModule(
            layers, self.num_stages, loss_fn=self._compute_loss, partition_method="uniform"
        )
        return super().initialize(deepspeed, module, optimizer, settings)

    def accumulate(self, batches: Sequence[Batch], denominator: Tensor, step: int) -> Tensor:
        self.seed_dropout(step, 0)
        # DeepSpeed averages over microbatches and data ranks; `loss_factor` undoes this.
        self.denominator, self.losses = denominator, []
        self.loss_factor = float(len(batches) * self.dp_rank_and_size.size)
        self.deepspeed.reset_activation_shape()
        self.deepspeed.train_batch(_iter_inputs_and_labels(batches))
        num_rows = sum(len(batch.inputs_BS) for batch in batches)
        return torch.cat(self.losses) if self.is_last_stage else torch.zeros(num_rows, device=self.device)

    def step(self) -> None:
        run_optimizer_step(self.deepspeed)

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        self.denominator, self.loss_factor, self.losses = torch.ones((), device=self.device), 1.0, []
        self.deepspeed.reset_activation_shape()
        self.deepspeed.eval_batch(
            _iter_inputs_and_labels([batch]), reduce_output=None, bcast_loss=False, num_micro_batches=1
        )
        return torch.cat(self.losses) if self.is_last_stage else torch.zeros(len(batch.inputs_BS), device=self.device)

    def _compute_loss(self, logits_BSV: Tensor, labels: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of one microbatch on the last stage. DeepSpeed calls this function."""
        assert self.model.head is not None
        loss, terms = self.model.head.select_loss()
        targets_BS, loss_weights_BS = labels if isinstance(labels, tuple) else (labels, None)
        losses_B = loss(logits_BSV, targets_BS, terms, loss_weights_BS) / self.denominator
        self.losses.append(losses_B.detach().float())
        return losses_B.sum() * self.loss_factor


def _iter_inputs_and_labels(batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Any]]:
    """Yield (inputs, targets) of each batch. With loss weights, a pair (targets, loss weights) takes the targets'
    place."""
    for batch in batches:
        weights_BS = batch.loss_weights_BS
        yield batch.inputs_BS, batch.targets_BS if weights_BS is None else (batch.targets_BS, weights_BS)
