"""The accelerate engine (engine: accelerate), for runs that `accelerate launch` starts.

accelerate wraps the model in DDP, FSDP2 or DeepSpeed. Loss scaling, clipping and the learning rate are ours, because
accelerate would divide the loss by the number of microbatches and step a scheduler once per process.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from dist_llm.checkpoint.checkpoint_state import CheckpointState, TorchState
from dist_llm.config.load import Violation
from dist_llm.config.schema import Config
from dist_llm.engines.base import Engine
from dist_llm.engines.data_parallel_engine import DataParallelEngine
from dist_llm.engines.deepspeed_engine import DeepSpeedEngine
from dist_llm.engines.optimizer_step import step_and_zero_grad
from dist_llm.errors import ConfigError
from dist_llm.launch.environment import check_accelerate, prepare_accelerate
from dist_llm.models.build_model import build_param_specs
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.optim import gradient_clipping
from dist_llm.optim.build_optimizer import build_optimizer
from dist_llm.parallel.parallelize import build_model_parts
from dist_llm.parallel.precision import fsdp_policy
from dist_llm.sharded import is_sharded, to_local

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}  # backend of the process group, by device type


def build_engine(config: Config, device: torch.device) -> Engine:
    """Build the engine that the config key `accelerate.plugin` selects."""
    return (AccelerateDeepSpeedEngine if config.uses_deepspeed else AccelerateEngine)(config, device)


def check_config(config: Config, device: torch.device) -> Iterator[Violation]:
    """Yield violations where `accelerate launch` or this machine contradicts the config."""
    return check_accelerate(config, device)


class AccelerateEngine(DataParallelEngine):
    """An `Engine` with DDP or FSDP2 of accelerate. `config` must be resolved, and a process group must exist."""

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        accelerate = prepare_accelerate()
        options: dict[str, Any] = {"cpu": device.type == "cpu"}
        if config.accelerate.plugin == "fsdp2":
            options["fsdp_plugin"] = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2,
                mixed_precision_policy=fsdp_policy(config.precision),
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
            )
        self.accelerator = accelerate.Accelerator(
            mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
            gradient_accumulation_steps=1,
            **options,
        )
        (self.model,) = build_model_parts(config, None, device)
        optimizer = build_optimizer(config.optim, self.model.named_parameters(), build_param_specs(config.model))
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        _check_plugin(self.accelerator, config.accelerate.plugin, dist.get_world_size(), self.prepared)

    @property
    def state(self) -> CheckpointState:
        return TorchState(self.model, self.optimizer.optimizer)

    def accumulate(self, batches: Sequence[Batch], denominator: Tensor, step: int) -> Tensor:
        self.prepared.train()
        losses = []
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.prepared):
                self.seed_dropout(step, index)
                losses_B = self.prepared(batch.inputs_BS, **batch.forward_arguments()) / denominator
                self.accelerator.backward(losses_B.sum() * self.dp_rank_and_size.size)
            losses.append(losses_B.detach())
        return torch.cat(losses)

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        local_grads = [to_local(grad) for grad in grads]
        norm = gradient_clipping.compute_global_norm(local_grads).to(self.device)
        if any(map(is_sharded, grads)):
            norm = self.all_reduce_over_dp_and_cp(norm.square()).sqrt()
        if should_apply is not None and not should_apply(norm):
            self.optimizer.zero_grad()
            return norm
        if self.config.optim.clip:
            gradient_clipping.clip_grads_(local_grads, norm, self.config.optim.clip)
        step_and_zero_grad(self.optimizer, lr)
        return norm

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        self.prepared.eval()
        losses_B: Tensor = self.prepared(batch.inputs_BS, **batch.forward_arguments())
        return losses_B


class AccelerateDeepSpeedEngine(DeepSpeedEngine):
    """The DeepSpeed engine, created by accelerate. The step is the same as without accelerate."""

    def initialize(self, deepspeed: Any, model: Decoder, optimizer: optim.Optimizer, settings: dict[str, Any]) -> Any:
        accelerate = prepare_accelerate()
        accelerator = accelerate.Accelerator(
            deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=settings),
            kwargs_handlers=[accelerate.InitProcessGroupKwargs(backend=BACKENDS[self.device.type])],
        )
        engine, _ = accelerator.prepare(model, optimizer)
        _check_plugin(accelerator, "deepspeed", dist.get_world_size(), engine)
        return engine


def _check_plugin(accelerator: Any, plugin: str, world_size: int, prepared: nn.Module) -> None:
    """Raise ConfigError unless accelerate runs the requested plugin. On CPUs it may silently run a different one."""
    actual = str(accelerator.distributed_type.value)
    expected = {"ddp": ("MULTI_CPU", "MULTI_GPU"), "fsdp2": ("FSDP",), "deepspeed": ("DEEPSPEED",)}[plugin]
    single_process = world_size == 1 and plugin == "ddp"
    if accelerator.num_processes != world_size or (actual not in expected and not single_process):
        raise ConfigError(
            f"accelerate.plugin: {plugin} on {world_size} ranks was requested, but accelerate runs {actual} on "
            f"{accelerator.num_processes}, with the model as {type(prepared).__name__}; check the settings that "
            "`accelerate env` prints, and start as many processes as there are ranks"
        )
