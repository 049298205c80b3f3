"""Pipeline parallelism: which stage holds what, and the schedule that runs a global batch through them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules

from dist_llm.config.derive import TWO_STAGE_SCHEDULES, gated
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.mesh import to_local

SCHEDULES = {
    "1f1b": schedules.Schedule1F1B,
    "gpipe": schedules.ScheduleGPipe,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
}
FORWARD = schedules.FORWARD
BACKWARDS = (schedules.FULL_BACKWARD, schedules.BACKWARD_WEIGHT)


def count_stages(schedule: str, ranks: int) -> int:
    return ranks * (2 if schedule in TWO_STAGE_SCHEDULES else 1)


def rank_stages(schedule: str, rank: int, ranks: int) -> list[int]:
    """The stages that a rank holds. In `zbv` they run down the ranks and up again: rank 0 has both ends."""
    if schedule == "zbv":
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, count_stages(schedule, ranks), ranks))


def split_layers(model: ModelConfig, stages: int, balance: str) -> list[range]:
    """Blocks for each stage, every stage at least one: equal counts, or equal work by matrix weights.

    By cost the head weighs as its matrix does, in blocks; an embedding look-up weighs nothing but
    its weights' update, taken as a tenth of that. An encoder-decoder's blocks count as one row of equals.
    """
    blocks = model.n_encoder_layers + model.n_layers
    attention = 2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads)
    feedforward = model.d_model * model.d_ff * (3 if gated(model) else 2)
    head = model.vocab_size * model.d_model / (attention + feedforward) if balance == "cost" else 0.0
    # Work done before block i, the embedding in front of the first block.
    before = [0.1 * head + layer for layer in range(blocks + 1)]
    share = (before[-1] + head) / stages
    cuts = [0]
    for stage in range(1, stages):
        nearest = min(range(blocks + 1), key=lambda layer: abs(before[layer] - stage * share))
        # Room for at least one block before and in each stage after.
        cuts.append(min(max(nearest, cuts[-1] + 1), blocks - (stages - stage)))
    cuts.append(blocks)
    return [range(start, end) for start, end in pairwise(cuts)]


class Pipeline:
    """This rank's stages and the schedule over all of them."""

    def __init__(self, config: Config, mesh: DeviceMesh, parts: Sequence[Decoder], device: torch.device) -> None:
        parallel = config.parallel
        self.config, self.device, self.name = config, device, parallel.pp_schedule
        self.group, self.ranks = mesh.get_group("pp"), parallel.pp
        numbers = rank_stages(self.name, mesh.get_local_rank("pp"), self.ranks)
        self.parts = dict(zip(numbers, parts, strict=True))  # in the order of the stages
        self.count = count_stages(self.name, self.ranks)
        self.layers = split_layers(config.model, self.count, parallel.pp_split)
        self.has_first_stage, self.has_last_stage = 0 in numbers, self.count - 1 in numbers
        share = config.data.global_batch // (parallel.dp_replicate * parallel.dp_shard)
        stages = [PipelineStage(part, n, self.count, device, group=self.group) for n, part in self.parts.items()]
        self.num_valid_tokens, self.losses = torch.ones((), device=device), list[Tensor]()
        self.schedule = SCHEDULES[self.name](
            stages if self.name in TWO_STAGE_SCHEDULES else stages[0],
            share // config.data.micro_batch,
            loss_fn=self._loss,
            scale_grads=False,  # by torch
        )
        table_stages = [number for number in range(self.count) if self._has_token_table(number)]
        self.tied_embedding = None
        if len(table_stages) > 1:
            self.tied_embedding = TiedEmbeddingGroup(
                parts, mesh, sorted({self.rank_of_stage(number) for number in table_stages})
            )

    def accumulate(self, batches: Sequence[Batch], num_valid_tokens: Tensor) -> Tensor:
        """Forward and backward of all microbatches; each row's losses / scored on the last stage's rank, else 0."""
        self.num_valid_tokens, self.losses = num_valid_tokens, []
        whole = Batch.joined(batches)
        sums: list[Tensor] = []
        self.schedule.step(
            *((whole.inputs_BS,) if self.has_first_stage else ()),
            target=whole.targets_BS if self.has_last_stage else None,
            losses=sums if self.has_last_stage else None,
            return_outputs=False,
            **_model_arguments(whole),
        )
        # The first time torch also tries the loss on made-up values, to learn shapes: those come before.
        rows = self.losses[-len(sums) :]
        return torch.cat(rows) if self.has_last_stage else torch.zeros(len(whole.inputs_BS), device=self.device)

    def _loss(self, losses_B: Tensor, targets_BS: Tensor) -> Tensor:
        """The last stage's output is its losses already. Every schedule takes microbatches forward in their order."""
        losses_B = losses_B / self.num_valid_tokens
        self.losses.append(losses_B.detach())
        return losses_B.sum()

    def reduce_tied_grads(self) -> None:
        """Add up the two gradients of a tied embedding, once both are laid out as their weights."""
        if self.tied_embedding is not None:
            self.tied_embedding.reduce_grads()

    def score(self, batch: Batch) -> Tensor:
        """Forward alone, stage after stage; each row's sum of losses on the last stage's rank, else 0.

        Not by the schedule: without its backwards torch's `zbv` waits for itself. Ranks still overlap,
        each going on to the next batch once it has handed this one over.
        """
        hidden: tuple[Tensor, ...] = (batch.inputs_BS,)
        for number, part in self.parts.items():
            if number > 0 and number - 1 not in self.parts:
                hidden = tuple(torch.empty(shape, device=self.device) for shape in self._input_shapes(batch, number))
                for x in hidden:
                    dist.recv(x, group=self.group, group_src=self.rank_of_stage(number - 1))
            out = part(*hidden, **_model_arguments(batch))
            hidden = out if isinstance(out, tuple) else (out,)
            if number + 1 < self.count and number + 1 not in self.parts:
                for x in hidden:
                    dist.send(
                        x.to(torch.get_default_dtype()).contiguous(),
                        group=self.group,
                        group_dst=self.rank_of_stage(number + 1),
                    )
        return hidden[0] if self.has_last_stage else torch.zeros(len(batch.inputs_BS), device=self.device)

    def dry_run_forward(self, batch: Batch) -> list[Tensor]:
        """This rank's stages on one microbatch, each by itself. Returns what others would hand over, made up."""
        inbox: list[Tensor] = []
        for number, part in self.parts.items():
            hidden: tuple[Tensor, ...] = (batch.inputs_BS,)
            if number > 0:
                shapes = self._input_shapes(batch, number)
                hidden = tuple(torch.zeros(shape, device=self.device, requires_grad=True) for shape in shapes)
                inbox += hidden
            part(*hidden, **_model_arguments(batch))
        return inbox

    def peak_in_flight(self, sizes: Sequence[int]) -> int:
        """The most that is held at once over the schedule, of what one microbatch keeps of each stage.

        Until backward is through with it, and where backward is in two, through with the weights.
        """
        held = most = 0
        each = dict(zip(self.parts, sizes, strict=True))
        for action in self.schedule.pipeline_order[dist.get_rank(self.group)]:
            if action is not None and action.computation_type is FORWARD:
                held += each[action.stage_index]
            elif action is not None and action.computation_type in BACKWARDS:
                held -= each[action.stage_index]
            most = max(most, held)
        return most

    def rank_of_stage(self, number: int) -> int:
        """The pipeline rank that holds a stage."""
        return next(rank for rank in range(self.ranks) if number in rank_stages(self.name, rank, self.ranks))

    def _has_token_table(self, number: int) -> bool:
        """Whether a stage looks up tokens, or projects on them: these all hold the table of token vectors."""
        model = self.config.model
        last = number == self.count - 1 and model.tie_embeddings
        return number == 0 or last or (model.n_encoder_layers > 0 and model.n_encoder_layers in self.layers[number])

    def _input_shapes(self, batch: Batch, number: int) -> list[tuple[int, int, int]]:
        """Of the activations that stage `number` is handed: sequence parallelism hands on slices.

        An encoder's, where there is one; and those of the stack with the head, where it has begun.
        """
        parallel, model = self.config.parallel, self.config.model
        slices = parallel.tp if parallel.sequence_parallel else 1
        tokens = [batch.source.tokens_BT] if batch.source is not None else []
        if self.layers[number].start > model.n_encoder_layers or not tokens:
            tokens.append(batch.inputs_BS)
        return [(len(each), each.shape[1] // slices, model.d_model) for each in tokens]


def _model_arguments(batch: Batch) -> dict[str, Any]:
    """What every stage is told. Positions too: under sequence parallelism a later one sees but a slice."""
    found = batch.arguments()
    if batch.positions_BS is None:
        positions_BS = torch.arange(batch.inputs_BS.shape[1], device=batch.inputs_BS.device)
        found["positions_BS"] = positions_BS.expand_as(batch.inputs_BS)
    return found if batch.source is None else found | {"tokens_BS": batch.inputs_BS}


class TiedEmbeddingGroup:
    """Several stages hold the table of token vectors: their gradients are added, their copies stay equal."""

    def __init__(self, parts: Sequence[Decoder], mesh: DeviceMesh, stage_ranks: Sequence[int]) -> None:
        self.weights = [part.embed.tokens.weight for part in parts if part.embed is not None]
        self.group: dist.ProcessGroup | None = None
        # Every rank must take part in making every group.
        columns = mesh.mesh.flatten(1).t().tolist()  # mesh axis 0 is pp
        for column in columns:
            ranks = [column[stage_rank] for stage_rank in stage_ranks]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                self.group = group

    def reduce_grads(self) -> None:
        """Add the stages' gradients of the table."""
        shares = [to_local(weight.grad) for weight in self.weights if weight.grad is not None]
        if not shares:
            return
        # A rank may hold it twice: zbv has both ends on the first.
        total = shares[0] if len(shares) == 1 else torch.stack(shares).sum(0)
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(total, group=self.group)
        for share in shares:
            if share is not total:
                share.copy_(total)
