"""The step in plain torch: one process, or any layout that `parallel` can lay out."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_llm.checkpoint.state import Held, State
from dist_llm.config.derive import SPLIT_BACKWARD
from dist_llm.config.schema import Config
from dist_llm.objectives.batch import Batch
from dist_llm.optim import gradient_clipping
from dist_llm.optim.build_optimizer import build_optimizer, select_muon_params
from dist_llm.optim.loss_scale import LossScale
from dist_llm.optim.muon import Orthogonalize, orthogonalize
from dist_llm.parallel.activation_budget import fit_activation_budget
from dist_llm.parallel.context_parallel import shard_sequences
from dist_llm.parallel.distributed_muon import DistributedOrthogonalize
from dist_llm.parallel.fsdp import COMPUTE_DTYPES
from dist_llm.parallel.mesh import (
    DATA_AXES,
    SHARD_AXES,
    all_gather_ints,
    all_reduce_over,
    build_mesh,
    local_with_offset,
    to_local,
)
from dist_llm.parallel.parallelize import build_model_parts
from dist_llm.parallel.pipeline_parallel import Pipeline
from dist_llm.parallel.replica_check import ReplicaGroups
from dist_llm.parallel.tensor_parallel import all_reduce_replicated_grads


class NativeEngine:
    """See `Engine`. `config` is resolved; a process group exists if there is more than one rank."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.mesh = build_mesh(config.parallel, device.type) if dist.is_initialized() else None
        self.parts = build_model_parts(config, self.mesh, device)
        self.pipeline: Pipeline | None = None
        if self.mesh is not None and config.parallel.pp > 1:
            self.pipeline = Pipeline(config, self.mesh, self.parts, device)
        self.fitted = not config.parallel.activations_gib
        self.loss_scale = LossScale() if config.precision == "fp16" else None
        self.optimizer = self._optimizer()
        # Where activations are equal on the tensor ranks, so must their dropout be; else it must differ.
        split = ("pp", "dp_replicate", "dp_shard", "cp", *(("tp",) if config.parallel.sequence_parallel else ()))
        self.dropout_stream = tuple(self._place(axis) for axis in split)

    def _optimizer(self) -> optim.Optimizer:
        config = self.config.optim
        dtype = torch.get_default_dtype() if self.config.precision == "fp32" else torch.bfloat16
        orthogonalize_fn: Orthogonalize = partial(orthogonalize, dtype=dtype)
        if config.name == "muon" and self.mesh is not None:
            matrices = list(select_muon_params(self.named_parameters()).values())
            orthogonalize_fn = DistributedOrthogonalize(self.mesh, matrices, dtype)
        return build_optimizer(config, self.named_parameters(), to_local, local_with_offset, orthogonalize_fn)

    @property
    def data_rank(self) -> tuple[int, int]:
        shards = self.config.parallel.dp_shard
        return self._place("dp_replicate") * shards + self._place(
            "dp_shard"
        ), self.config.parallel.dp_replicate * shards

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of this rank's parameters under their names in the whole model.

        Those that the optimizer knows: after a forward without backward FSDP still shows gathered copies.
        """
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            yield from part.named_parameters()

    @property
    def state(self) -> State:
        return Held(self, self.optimizer)

    @property
    def copies(self) -> ReplicaGroups:
        if self.mesh is None:
            return []
        every = dict(self.named_parameters())
        found: list[tuple[dist.ProcessGroup, dict[str, Tensor]]] = []
        if self.mesh["dp_replicate"].size() > 1:
            found.append((self.mesh.get_group("dp_replicate"), {name: to_local(each) for name, each in every.items()}))
        # Without sequence_parallel tensor ranks add nothing up: their copies are equal only if their kernels are.
        if self.mesh["tp"].size() > 1 and self.config.parallel.sequence_parallel:
            whole = {name: to_local(each) for name, each in every.items() if not _split_by_tp(each)}
            found.append((self.mesh.get_group("tp"), whole))
        return [(group, tensors) for group, tensors in found if tensors]

    def total(self, value: Tensor | int) -> Tensor:
        counts = self.pipeline is None or self.pipeline.has_last_stage  # one stage speaks for its pipeline
        # Filled on the device: a copy from the host would wait for it.
        summed = value * counts if isinstance(value, Tensor) else torch.full((), value * counts, device=self.device)
        return summed if self.mesh is None else all_reduce_over(summed, self.mesh, ("pp", *DATA_AXES))

    def gather(self, value: int) -> list[int]:
        return [value] if self.mesh is None else all_gather_ints(value, self.device)

    def cut(self, batch: Batch) -> Batch:
        return shard_sequences(batch, self._place("cp"), self.config.parallel.cp).to(self.device)

    def accumulate(self, batches: Sequence[Batch], scored: Tensor, step: int) -> Tensor:
        for part in self.parts:
            part.train()
        if not self.fitted:
            self._fit(batches[0], step)
        scale = self.loss_scale.value if self.loss_scale else 1.0
        scored = scored.clamp(min=1) / scale
        if self.pipeline is None:
            losses = self._accumulate(batches, scored, step)
        else:
            self._seed(step, 0)
            with self._precision():
                losses = self.pipeline.accumulate(batches, scored)
        if self.mesh is not None and self.mesh["tp"].size() > 1:
            for part in self.parts:
                all_reduce_replicated_grads(part, self.mesh["tp"], self.device)
        if self.pipeline is not None:
            self.pipeline.reduce_tied_grads()
        return losses / scale

    def _fit(self, batch: Batch, step: int) -> None:
        """Choose which blocks are computed again, once, by what the first microbatch keeps: all have its shape."""
        self._seed(step, 0)
        pipeline, parallel = self.pipeline, self.config.parallel

        def forward() -> list[Tensor]:
            if pipeline is not None:
                return pipeline.dry_run_forward(batch)
            self._forward(batch)
            return []

        split = parallel.pp > 1 and parallel.pp_schedule in SPLIT_BACKWARD
        held = sum if pipeline is None else pipeline.peak_in_flight
        with self._precision():
            fit_activation_budget(self.parts, forward, held, self.mesh, parallel.activations_gib, selective=not split)
        self.fitted = True

    def _accumulate(self, batches: Sequence[Batch], scored: Tensor, step: int) -> Tensor:
        """One microbatch after another; gradients are reduced with the last, or with each."""
        (model,) = self.parts
        losses = []
        for number, batch in enumerate(batches):
            if isinstance(model, FSDPModule):
                last = number == len(batches) - 1
                model.set_requires_gradient_sync(last or self.config.parallel.reduce_each_microbatch)
                # `never` keeps weights gathered from one microbatch to the next, too: only the update changes them.
                model.set_reshard_after_backward(last or self.config.parallel.reshard != "never")
            self._seed(step, number)
            with self._precision():
                losses_B = self._forward(batch) / scored
            losses_B.sum().backward()
            losses.append(losses_B.detach())
            del losses_B  # and the graph with it, before the next one grows
        return torch.cat(losses)

    def update(self, lr: float, accept: Callable[[Tensor], bool] | None = None) -> Tensor:
        parameters = [p for part in self.parts for p in part.parameters() if p.grad is not None]
        scale = self.loss_scale.value if self.loss_scale else 1.0
        norm = self._norm() / scale
        if self.loss_scale:
            finite = bool(torch.isfinite(norm))
            self.loss_scale.update(finite)
            if not finite:
                self.optimizer.zero_grad()
                return norm
        if accept is not None and not accept(norm):
            self.optimizer.zero_grad()
            return norm
        if self.config.optim.clip or self.loss_scale:
            gradients = [to_local(p.grad) for p in parameters if p.grad is not None]
            gradient_clipping.clip_grads_(gradients, norm, self.config.optim.clip or math.inf, scale)
        step_at(self.optimizer, lr)
        return norm

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        for part in self.parts:
            part.eval()
        with self._precision():
            return self._forward(batch) if self.pipeline is None else self.pipeline.score(batch)

    def _forward(self, batch: Batch) -> Tensor:
        (model,) = self.parts
        return model(batch.inputs_BS, **batch.forward_arguments())

    def _norm(self) -> Tensor:
        """Over every parameter of the whole model, each element once.

        Left out here: a parameter that all tensor ranks hold, on all of them but the first; and the
        last stage's copy of a tied embedding.
        """
        gradients = []
        for part in self.parts:
            for name, parameter in part.named_parameters():
                copy = name == "embed.tokens.weight" and not part.is_first_stage
                if parameter.grad is not None and not copy and (self._place("tp") == 0 or _split_by_tp(parameter)):
                    gradients.append(to_local(parameter.grad))
        norm = gradient_clipping.global_norm(gradients).to(self.device)
        if self.mesh is None:
            return norm
        whole = all_reduce_over(norm.square(), self.mesh, ("pp", *SHARD_AXES, "tp"))
        replicas = self.mesh["dp_replicate"].size()
        if self.mesh.size() > replicas:
            # Each adds up by itself, on some networks in an order of its own: the mean is the same for all.
            whole = all_reduce_over(whole, self.mesh, ("dp_replicate",)) / replicas
        return whole.sqrt()

    def _seed(self, step: int, microbatch: int) -> None:
        """Dropout of this microbatch on this rank: a function of the step, with no state to save."""
        if self.config.model.dropout:
            torch.manual_seed(mix(self.config.run.seed, step, microbatch, *self.dropout_stream))

    def _place(self, axis: str) -> int:
        return self.mesh.get_local_rank(axis) if self.mesh is not None else 0

    def _precision(self) -> AbstractContextManager[None]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, COMPUTE_DTYPES[self.config.precision])


def step_at(optimizer: optim.Optimizer, lr: float) -> None:
    """Step at this rate, and clear the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def _split_by_tp(parameter: nn.Parameter) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    mesh: DeviceMesh = parameter.device_mesh
    names = mesh.mesh_dim_names or ()
    return "tp" in names and not parameter.placements[names.index("tp")].is_replicate()


def mix(*numbers: int) -> int:
    """A 63-bit seed that depends on all of `numbers` and their order."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
