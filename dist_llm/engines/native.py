"""The step in plain torch: one process, or FSDP2 over any mesh of data-parallel ranks."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dist_llm.config.schema import Config
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.optim import clip
from dist_llm.optim.build import build_optimizer
from dist_llm.parallel.mesh import build_mesh
from dist_llm.parallel.parallelize import parallelize


class NativeEngine:
    """See `Engine`. `config` is resolved; a process group exists if there is more than one rank."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.mesh = build_mesh(config.parallel, device.type) if dist.is_initialized() else None
        with torch.device("meta"):
            self.model = Decoder(config.model, CrossEntropy(config.loss.label_smoothing, config.loss.z_loss))
        parallelize(self.model, config, self.mesh, device)
        self.optimizer = build_optimizer(config.optim, self.model.named_parameters())

    @property
    def data_rank(self) -> tuple[int, int]:
        if self.mesh is None:
            return 0, 1
        replica, ranks = self.mesh.get_local_rank("dp_replicate"), self.config.parallel.dp_shard
        return replica * ranks + self.mesh.get_local_rank("dp_shard"), self.config.parallel.dp_replicate * ranks

    def total(self, value: Tensor | int) -> Tensor:
        summed = torch.as_tensor(value, device=self.device).clone()
        if self.mesh is not None:
            dist.all_reduce(summed)
        return summed

    def accumulate(self, batch: Batch, scored: Tensor, last: bool, seed: int) -> Tensor:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        if self.config.model.dropout:
            torch.manual_seed(seed)
        self.model.train()
        with self._precision():
            loss = self._loss(batch) / scored.clamp(min=1)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(self, lr: float) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = self._norm(gradients)
        if self.config.optim.clip:
            clip.scale([_local(gradient) for gradient in gradients], norm, self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        self.model.eval()
        with self._precision():
            return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device)
        return self.model(batch.inputs_BS, batch.targets_BS, batch.visible)

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        """Over every parameter on every rank: shards of one parameter live on the ranks of dp_shard."""
        norm = clip.norm([_local(gradient) for gradient in gradients])
        if self.mesh is None:
            return norm
        squares = norm.square()
        dist.all_reduce(squares, group=self.mesh.get_group("dp_shard"))
        return squares.sqrt()

    def _precision(self) -> AbstractContextManager[None]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
