"""Pipeline parallelism: which stage holds what, and the schedule that runs a global batch through them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules

from dist_llm.config.check import TWO_STAGE_SCHEDULES
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.mesh import local

SCHEDULES = {
    "1f1b": schedules.Schedule1F1B,
    "gpipe": schedules.ScheduleGPipe,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}


def stage_count(schedule: str, ranks: int) -> int:
    return ranks * (2 if schedule in TWO_STAGE_SCHEDULES else 1)


def stages_of(schedule: str, rank: int, ranks: int) -> list[int]:
    """The stages that a rank holds. In `zbv` they run down the ranks and up again: rank 0 has both ends."""
    if schedule == "zbv":
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, stage_count(schedule, ranks), ranks))


def split_layers(model: ModelConfig, stages: int, how: str) -> list[range]:
    """Blocks for each stage, every stage at least one: equal counts, or equal work by matrix weights.

    By cost the head weighs as its matrix does, in blocks; an embedding look-up weighs nothing but
    its weights' update, taken as a tenth of that.
    """
    attention = 2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads)
    feedforward = model.d_model * model.d_ff * (3 if model.activation == "swiglu" else 2)
    head = model.vocab_size * model.d_model / (attention + feedforward) if how == "cost" else 0.0
    # Work done before block i, the embedding in front of the first block.
    before = [0.1 * head + layer for layer in range(model.n_layers + 1)]
    share = (before[-1] + head) / stages
    cuts = [0]
    for stage in range(1, stages):
        nearest = min(range(model.n_layers + 1), key=lambda layer: abs(before[layer] - stage * share))
        # Room for at least one block before and in each stage after.
        cuts.append(min(max(nearest, cuts[-1] + 1), model.n_layers - (stages - stage)))
    cuts.append(model.n_layers)
    return [range(start, end) for start, end in pairwise(cuts)]


class Pipeline:
    """This rank's stages and the schedule over all of them."""

    def __init__(self, config: Config, mesh: DeviceMesh, parts: Sequence[Decoder], device: torch.device) -> None:
        parallel = config.parallel
        self.config, self.device, self.name = config, device, parallel.pp_schedule
        self.group, self.ranks = mesh.get_group("pp"), parallel.pp
        numbers = stages_of(self.name, mesh.get_local_rank("pp"), self.ranks)
        self.parts = dict(zip(numbers, parts, strict=True))  # in the order of the stages
        self.count = stage_count(self.name, self.ranks)
        self.first, self.last = 0 in numbers, self.count - 1 in numbers
        share = config.data.global_batch // (parallel.dp_replicate * parallel.dp_shard)
        stages = [PipelineStage(part, n, self.count, device, group=self.group) for n, part in self.parts.items()]
        self.scored = torch.ones((), device=device)
        self.schedule = SCHEDULES[self.name](
            stages if self.name in TWO_STAGE_SCHEDULES else stages[0],
            share // config.data.micro_batch,
            # The last stage's output is its loss already; gradients are never rescaled by torch.
            loss_fn=lambda loss, targets: loss / self.scored,
            scale_grads=False,
        )
        self.tied = TiedEmbedding(parts, mesh) if config.model.tie_embeddings else None

    def accumulate(self, batches: Sequence[Batch], scored: Tensor) -> Tensor:
        """Forward and backward of all microbatches; the sum of losses / scored on the last stage's rank, else 0."""
        self.scored = scored
        inputs = torch.cat([batch.inputs_BS for batch in batches])
        targets = torch.cat([batch.targets_BS for batch in batches])
        positions = torch.cat([_positions(batch) for batch in batches])
        losses: list[Tensor] = []
        self.schedule.step(
            *((inputs,) if self.first else ()),
            target=targets if self.last else None,
            losses=losses if self.last else None,
            return_outputs=False,
            targets_BS=targets,
            visible=batches[0].visible,
            positions_BS=positions,
        )
        return torch.stack(losses).sum().detach() if self.last else torch.zeros((), device=self.device)

    def reduce_tied(self) -> None:
        """Add up the two gradients of a tied embedding, once both are laid out as their weights."""
        if self.tied is not None:
            self.tied.reduce()

    def score(self, batch: Batch) -> Tensor:
        """Forward alone, stage after stage; the sum of losses on the last stage's rank, else 0.

        Not by the schedule: without its backwards torch's `zbv` waits for itself. Ranks still overlap,
        each going on to the next batch once it has handed this one over.
        """
        x, positions_BS = batch.inputs_BS, _positions(batch)
        for number, part in self.parts.items():
            if number > 0 and number - 1 not in self.parts:
                x = torch.empty(self._hidden_shape(batch), device=self.device)
                dist.recv(x, group=self.group, group_src=self.owner(number - 1))
            x = part(x, batch.targets_BS, batch.visible, None, positions_BS)
            if number + 1 < self.count and number + 1 not in self.parts:
                dist.send(x.float().contiguous(), group=self.group, group_dst=self.owner(number + 1))
        return x if self.last else torch.zeros((), device=self.device)

    def owner(self, number: int) -> int:
        """The pipeline rank that holds a stage."""
        return next(rank for rank in range(self.ranks) if number in stages_of(self.name, rank, self.ranks))

    def _hidden_shape(self, batch: Batch) -> tuple[int, int, int]:
        """Of the activations between stages: sequence parallelism hands on slices."""
        B, S = batch.inputs_BS.shape
        parallel = self.config.parallel
        return B, S // (parallel.tp if parallel.sequence_parallel else 1), self.config.model.d_model


def _positions(batch: Batch) -> Tensor:
    """Given to every stage, not derived by it: under sequence parallelism a later one sees but a slice."""
    if batch.positions_BS is not None:
        return batch.positions_BS
    return torch.arange(batch.inputs_BS.shape[1], device=batch.inputs_BS.device).expand_as(batch.inputs_BS)


class TiedEmbedding:
    """First and last stage each hold the tied weight: their gradients are added, their copies stay equal."""

    def __init__(self, parts: Sequence[Decoder], mesh: DeviceMesh) -> None:
        self.weights = [part.embed.tokens.weight for part in parts if part.embed is not None]
        self.group: dist.ProcessGroup | None = None
        # Every rank must take part in making every group.
        columns = mesh.mesh.flatten(1).t().tolist()  # mesh axis 0 is pp
        for column in columns:
            group = dist.new_group([column[0], column[-1]])
            if dist.get_rank() in (column[0], column[-1]):
                self.group = group

    def reduce(self) -> None:
        """Add the stages' gradients of the embedding."""
        if not self.weights:
            return
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        shares = [local(gradient) for gradient in gradients]
        if len(shares) == 2:  # zbv: one rank has both ends
            total = shares[0] + shares[1]
            for share in shares:
                share.copy_(total)
        else:
            dist.all_reduce(shares[0], group=self.group)
