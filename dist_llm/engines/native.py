"""The native engine (engine: native): the training step in plain torch, on any layout of section `parallel`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from dist_llm.checkpoint.checkpoint_state import CheckpointState, TorchState
from dist_llm.config.derive import SPLIT_BACKWARD
from dist_llm.config.schema import Config
from dist_llm.counter_rng import hash_seed
from dist_llm.engines.base import DataParallelRank
from dist_llm.engines.gradient_norm import compute_grad_norm
from dist_llm.engines.optimizer_step import clip_and_unscale_, step_and_zero_grad
from dist_llm.engines.router_balance import RouterBalancer, count_experts
from dist_llm.models.build_model import build_param_specs
from dist_llm.models.router_stats import RouterStats
from dist_llm.objectives.batch import Batch
from dist_llm.optim.build_optimizer import build_optimizer, select_muon_params
from dist_llm.optim.loss_scale import LossScale
from dist_llm.optim.muon import Orthogonalize, orthogonalize
from dist_llm.parallel.activation_budget import fit_activation_budget
from dist_llm.parallel.context_parallel import shard_sequences
from dist_llm.parallel.distributed_muon import DistributedOrthogonalizer
from dist_llm.parallel.fsdp import prepare_microbatch, reshard
from dist_llm.parallel.mesh import (
    BATCH_AXES,
    LOSS_AXES,
    STAGE_AXES,
    TOKEN_AXES,
    all_gather_ints,
    all_reduce_over_axes_,
    build_expert_mesh,
    build_mesh,
    number_to_tensor,
    rank_and_size,
)
from dist_llm.parallel.parallelize import build_model_parts
from dist_llm.parallel.pipeline_parallel import Pipeline
from dist_llm.parallel.precision import autocast
from dist_llm.parallel.replica_check import ReplicaGroups
from dist_llm.parallel.tensor_parallel import all_reduce_replicated_grads
from dist_llm.sharded import coordinate, is_replicated_over, local_with_offset, to_local


class NativeEngine:
    """An `Engine` in plain torch. `config` must be resolved. With several ranks, a process group must exist."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.mesh = build_mesh(config.parallel, device.type) if dist.is_initialized() else None
        expert_mesh = None
        if self.mesh is not None and count_experts(config.model):
            expert_mesh = build_expert_mesh(config.parallel, device.type)
        self.model_parts = build_model_parts(config, self.mesh, device, expert_mesh)
        self.router_balancer = RouterBalancer(config, self.model_parts, self.mesh, device)
        self.router_stats: dict[int, RouterStats] = {}  # of the last step, by layer
        self._num_microbatches = 0
        self.pipeline: Pipeline | None = None
        if self.mesh is not None and config.parallel.pp > 1:
            self.pipeline = Pipeline(config, self.mesh, self.model_parts, device)
        self._named_parameters = [
            name_and_parameter for part in self.model_parts for name_and_parameter in part.named_parameters()
        ]
        self.activation_budget_applied = not config.parallel.activations_gib
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self.optimizer = self._build_optimizer()
        # Dropout must be equal on tensor-parallel ranks whose activations are equal, and must differ otherwise.
        axes = ("pp", *(STAGE_AXES if config.parallel.sequence_parallel else TOKEN_AXES))
        self.dropout_coordinates = tuple(coordinate(self.mesh, axis) for axis in axes)

    def _build_optimizer(self) -> optim.Optimizer:
        config, specs = self.config.optim, build_param_specs(self.config.model)
        dtype = torch.get_default_dtype() if self.config.precision == "fp32" else torch.bfloat16
        orthogonalize_fn: Orthogonalize = partial(orthogonalize, dtype=dtype)
        if config.name == "muon" and self.mesh is not None:
            matrices = list(select_muon_params(config, self.named_parameters(), specs).values())
            orthogonalize_fn = DistributedOrthogonalizer(self.mesh, matrices, dtype)
        return build_optimizer(config, self.named_parameters(), specs, to_local, local_with_offset, orthogonalize_fn)

    @property
    def dp_rank_and_size(self) -> DataParallelRank:
        return DataParallelRank(*rank_and_size(self.mesh, BATCH_AXES))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this rank, the shards, with their names in the full model.

        The list is made in `__init__`, because from a forward pass until the end of the backward pass, FSDP replaces
        the shards in the modules by gathered weights.
        """
        yield from self._named_parameters

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers of this rank, which are equal on all ranks that hold the layer."""
        for model_part in self.model_parts:
            yield from model_part.named_buffers()

    @property
    def state(self) -> CheckpointState:
        return TorchState(self, self.optimizer, self._drop_gathered_weights)

    @property
    def replica_groups(self) -> ReplicaGroups:
        if self.mesh is None:
            return []
        params = dict(self.named_parameters())
        groups: list[tuple[dist.ProcessGroup, dict[str, Tensor]]] = []
        if self.mesh["dp_replicate"].size() > 1:
            shards = {name: to_local(parameter) for name, parameter in params.items()}
            groups.append((self.mesh.get_group("dp_replicate"), shards))
        # Without sequence_parallel, each tensor-parallel rank computes the gradients of replicated parameters itself.
        # These replicas are bitwise equal only if all kernels are deterministic, so they are not compared.
        if self.mesh["tp"].size() > 1 and self.config.parallel.sequence_parallel:
            replicas = {
                name: to_local(parameter) for name, parameter in params.items() if is_replicated_over(parameter, "tp")
            }
            groups.append((self.mesh.get_group("tp"), replicas))
        return [(group, tensors) for group, tensors in groups if tensors]

    def all_reduce_over_dp_and_cp(self, value: Tensor | float) -> Tensor:
        has_losses = self.pipeline is None or self.pipeline.has_last_stage
        total = (value if isinstance(value, Tensor) else number_to_tensor(value, self.device)) * has_losses
        return total if self.mesh is None else all_reduce_over_axes_(total, self.mesh, LOSS_AXES)

    def all_gather_ints(self, value: int) -> list[int]:
        return [value] if self.mesh is None else all_gather_ints(value, self.device)

    def to_local_batch(self, batch: Batch) -> Batch:
        return shard_sequences(batch, coordinate(self.mesh, "cp"), self.config.parallel.cp).to(self.device)

    def accumulate(self, batches: Sequence[Batch], denominator: Tensor, step: int) -> Tensor:
        for model_part in self.model_parts:
            model_part.train()
        scale = self.loss_scale.value if self.loss_scale else 1.0
        self.router_balancer.start_step(scale)
        if not self.activation_budget_applied:
            self._fit_activation_budget(batches[0], step)
        denominator = denominator / scale
        self._num_microbatches = len(batches)
        if self.pipeline is None:
            losses = self._accumulate_in_sequence(batches, denominator, step)
        else:
            self._seed_dropout(step, 0)
            with self._autocast():
                losses = self.pipeline.accumulate(batches, denominator)
        if self.mesh is not None and self.mesh["tp"].size() > 1:
            for model_part in self.model_parts:
                all_reduce_replicated_grads(model_part, self.mesh["tp"], self.device)
        if self.pipeline is not None:
            self.pipeline.reduce_tied_grads()
        return losses / scale

    def _fit_activation_budget(self, batch: Batch, step: int) -> None:
        """Choose the recompute mode of each block from the first microbatch. All microbatches have the same shape."""
        self._seed_dropout(step, 0)
        pipeline, parallel = self.pipeline, self.config.parallel

        def forward() -> list[Tensor]:
            if pipeline is not None:
                return pipeline.dry_run_forward(batch)
            self._forward(batch)
            return []

        splits_backward = parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD
        peak_in_flight = sum if pipeline is None else pipeline.peak_in_flight
        gib, selective = parallel.activations_gib, not splits_backward
        assert gib is not None
        with self._autocast():
            fit_activation_budget(self.model_parts, forward, peak_in_flight, self.mesh, gib, selective)
        self.activation_budget_applied = True

    def _accumulate_in_sequence(self, batches: Sequence[Batch], denominator: Tensor, step: int) -> Tensor:
        """Run forward and backward of one microbatch after the other.

        `prepare_microbatch` sets whether the gradients of a microbatch are reduced.
        """
        (model,) = self.model_parts
        losses = []
        for index, batch in enumerate(batches):
            prepare_microbatch(model, is_last=index == len(batches) - 1, parallel=self.config.parallel)
            self._seed_dropout(step, index)
            with self._autocast():
                losses_B = self._forward(batch) / denominator
            losses_B.sum().backward()
            losses.append(losses_B.detach())
            del losses_B  # frees the graph before the next forward
        return torch.cat(losses)

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        scale = self.loss_scale.value if self.loss_scale else 1.0
        norm = self._compute_grad_norm() / scale
        is_applied = self._update_loss_scale(norm) and (should_apply is None or should_apply(norm))
        if is_applied:
            parameters = (parameter for _, parameter in self._named_parameters)
            clip_and_unscale_(parameters, norm, self.config.optim.clip, scale)
            step_and_zero_grad(self.optimizer, lr)
        else:
            self.optimizer.zero_grad()
        self.router_stats = self.router_balancer.finish_step(self._num_microbatches, is_applied)
        return norm

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        for model_part in self.model_parts:
            model_part.eval()
        with self._autocast():
            return self._forward(batch) if self.pipeline is None else self.pipeline.score(batch)

    def _forward(self, batch: Batch) -> Tensor:
        (model,) = self.model_parts
        return model(batch.inputs_BS, **batch.forward_arguments())

    def _update_loss_scale(self, norm: Tensor) -> bool:
        """Adapt the loss scale of fp16 to this step. Return False if the gradients overflowed."""
        if self.loss_scale is None:
            return True
        is_finite = bool(torch.isfinite(norm))
        self.loss_scale.update(is_finite)
        return is_finite

    def _drop_gathered_weights(self) -> None:
        for model_part in self.model_parts:
            reshard(model_part)

    def _compute_grad_norm(self) -> Tensor:
        return compute_grad_norm(self.model_parts, self.mesh, self.device)

    def _seed_dropout(self, step: int, microbatch: int) -> None:
        """Seed dropout as a function of step, microbatch and rank. A checkpoint then needs no generator state."""
        if self.config.model.dropout:
            torch.manual_seed(hash_seed(self.config.run.seed, step, microbatch, *self.dropout_coordinates))

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.config.precision, self.device)
