"""Pipeline parallelism: which layers each stage holds, and the schedule that runs a global batch through the stages."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules

from dist_llm.config.derive import TWO_STAGE_SCHEDULES, is_gated
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.sharded import to_local

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
    """Return the number of stages over all ranks."""
    return ranks * (2 if schedule in TWO_STAGE_SCHEDULES else 1)


def rank_stages(schedule: str, rank: int, ranks: int) -> list[int]:
    """Return the stages of a rank.

    In `zbv` they run down the ranks and up again, so rank 0 holds the first and the last.
    """
    if schedule == "zbv":
        return [rank, 2 * ranks - 1 - rank]
    return list(range(rank, count_stages(schedule, ranks), ranks))


def split_layers(model: ModelConfig, stages: int, balance: str) -> list[range]:
    """Assign a range of blocks to each stage, at least one block per stage.

    `balance` "count" gives all stages equally many blocks. "cost" gives them equal work: the head costs as much as its
    matrix, in units of a block. An embedding look-up costs only the update of its weights, taken as a tenth of the
    head. The blocks of an encoder-decoder form one sequence, the encoder's first, and count as equal.
    """
    blocks = model.n_encoder_layers + model.n_layers
    attention = 2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads)
    feedforward = model.d_model * model.d_ff * (3 if is_gated(model) else 2)
    head = model.vocab_size * model.d_model / (attention + feedforward) if balance == "cost" else 0.0
    # Work done before block i. The embedding comes before the first block.
    cost_before = [0.1 * head + layer for layer in range(blocks + 1)]
    cost_per_stage = (cost_before[-1] + head) / stages
    cuts = [0]
    for stage in range(1, stages):
        nearest = min(range(blocks + 1), key=lambda layer: abs(cost_before[layer] - stage * cost_per_stage))
        # Leave at least one block for this stage and for each later stage.
        cuts.append(min(max(nearest, cuts[-1] + 1), blocks - (stages - stage)))
    cuts.append(blocks)
    return [range(start, end) for start, end in pairwise(cuts)]


class Pipeline:
    """This rank's pipeline stages and the schedule over all stages."""

    def __init__(self, config: Config, mesh: DeviceMesh, model_parts: Sequence[Decoder], device: torch.device) -> None:
        parallel = config.parallel
        self.config, self.device, self.name = config, device, parallel.pp_schedule
        self.group, self.ranks = mesh.get_group("pp"), parallel.pp
        stage_numbers = rank_stages(self.name, mesh.get_local_rank("pp"), self.ranks)
        # Stage number -> model part, in the order of the stages.
        self.model_parts = dict(zip(stage_numbers, model_parts, strict=True))
        self.count = count_stages(self.name, self.ranks)
        self.layers = split_layers(config.model, self.count, parallel.pp_split)
        self.has_first_stage, self.has_last_stage = 0 in stage_numbers, self.count - 1 in stage_numbers
        rank_batch = config.data.global_batch // (parallel.dp_replicate * parallel.dp_shard)
        stages = [
            PipelineStage(model_part, n, self.count, device, group=self.group)
            for n, model_part in self.model_parts.items()
        ]
        self.num_valid_tokens, self.losses = torch.ones((), device=device), list[Tensor]()
        self.schedule = SCHEDULES[self.name](
            stages if self.name in TWO_STAGE_SCHEDULES else stages[0],
            rank_batch // config.data.micro_batch,
            loss_fn=self._loss,
            scale_grads=False,  # torch would divide gradients by the number of microbatches
        )
        table_stages = [number for number in range(self.count) if self._has_token_table(number)]
        self.tied_embedding = None
        if len(table_stages) > 1:
            self.tied_embedding = TiedEmbeddingGroup(
                model_parts, mesh, sorted({self.rank_of_stage(number) for number in table_stages})
            )

    def accumulate(self, batches: Sequence[Batch], num_valid_tokens: Tensor) -> Tensor:
        """Run forward and backward of all microbatches.

        Return each sequence's loss divided by `num_valid_tokens`, [B]; zeros on ranks without the last stage.
        """
        self.num_valid_tokens, self.losses = num_valid_tokens, []
        full_batch = Batch.concatenate(batches)
        sums: list[Tensor] = []
        self.schedule.step(
            *((full_batch.inputs_BS,) if self.has_first_stage else ()),
            target=full_batch.targets_BS if self.has_last_stage else None,
            losses=sums if self.has_last_stage else None,
            return_outputs=False,
            **_model_arguments(full_batch),
        )
        # In the first step torch also calls the loss on placeholder values to infer shapes. Those losses come first.
        rows = self.losses[-len(sums) :]
        return torch.cat(rows) if self.has_last_stage else torch.zeros(len(full_batch.inputs_BS), device=self.device)

    def _loss(self, losses_B: Tensor, targets_BS: Tensor) -> Tensor:
        """Record the losses, which the last stage already outputs.

        Every schedule runs the forwards of the microbatches in order.
        """
        losses_B = losses_B / self.num_valid_tokens
        self.losses.append(losses_B.detach())
        return losses_B.sum()

    def reduce_tied_grads(self) -> None:
        """Sum the gradients of a tied embedding over its stages. Call this after FSDP has reduced and sharded them."""
        if self.tied_embedding is not None:
            self.tied_embedding.reduce_grads()

    def score(self, batch: Batch) -> Tensor:
        """Run forward only, stage after stage.

        Return each sequence's sum of losses, [B]; zeros on ranks without the last stage.

        This does not use the schedule: without backwards, torch's `zbv` deadlocks. Ranks still overlap, because each
        continues with the next batch after it has sent this one.
        """
        hidden: tuple[Tensor, ...] = (batch.inputs_BS,)
        for number, model_part in self.model_parts.items():
            if number > 0 and number - 1 not in self.model_parts:
                hidden = tuple(torch.empty(shape, device=self.device) for shape in self._input_shapes(batch, number))
                for x in hidden:
                    dist.recv(x, group=self.group, group_src=self.rank_of_stage(number - 1))
            out = model_part(*hidden, **_model_arguments(batch))
            hidden = out if isinstance(out, tuple) else (out,)
            if number + 1 < self.count and number + 1 not in self.model_parts:
                for x in hidden:
                    dist.send(
                        x.to(torch.get_default_dtype()).contiguous(),
                        group=self.group,
                        group_dst=self.rank_of_stage(number + 1),
                    )
        return hidden[0] if self.has_last_stage else torch.zeros(len(batch.inputs_BS), device=self.device)

    def dry_run_forward(self, batch: Batch) -> list[Tensor]:
        """Run each of this rank's stages on one microbatch, independently.

        Return the placeholder inputs that replace other stages' outputs.
        """
        inputs: list[Tensor] = []
        for number, model_part in self.model_parts.items():
            hidden: tuple[Tensor, ...] = (batch.inputs_BS,)
            if number > 0:
                shapes = self._input_shapes(batch, number)
                hidden = tuple(torch.zeros(shape, device=self.device, requires_grad=True) for shape in shapes)
                inputs += hidden
            model_part(*hidden, **_model_arguments(batch))
        return inputs

    def peak_in_flight(self, sizes: Sequence[int]) -> int:
        """Return the peak of saved bytes over the schedule, given the bytes that one microbatch saves in each stage.

        A stage holds them until the end of its backward; where backward is split in two, until the end of the weight
        backward.
        """
        in_flight = peak = 0
        stage_sizes = dict(zip(self.model_parts, sizes, strict=True))
        for action in self.schedule.pipeline_order[dist.get_rank(self.group)]:
            if action is not None and action.computation_type is FORWARD:
                in_flight += stage_sizes[action.stage_index]
            elif action is not None and action.computation_type in BACKWARDS:
                in_flight -= stage_sizes[action.stage_index]
            peak = max(peak, in_flight)
        return peak

    def rank_of_stage(self, number: int) -> int:
        """Return the pipeline rank that holds a stage."""
        return next(rank for rank in range(self.ranks) if number in rank_stages(self.name, rank, self.ranks))

    def _has_token_table(self, number: int) -> bool:
        """Return whether a stage embeds tokens or projects on tied embeddings.

        All such stages hold the token embedding.
        """
        model = self.config.model
        last = number == self.count - 1 and model.tie_embeddings
        return number == 0 or last or (model.n_encoder_layers > 0 and model.n_encoder_layers in self.layers[number])

    def _input_shapes(self, batch: Batch, number: int) -> list[tuple[int, int, int]]:
        """Return the shapes [B, S, D] of the activations that stage `number` receives.

        Sequence parallelism passes on slices of S.

        First the encoder's output, if the model has an encoder; then the decoder's activations, if the decoder has
        begun.
        """
        parallel, model = self.config.parallel, self.config.model
        slices = parallel.tp if parallel.sequence_parallel else 1
        tokens = [batch.encoder_input.tokens_BT] if batch.encoder_input is not None else []
        if self.layers[number].start > model.n_encoder_layers or not tokens:
            tokens.append(batch.inputs_BS)
        return [(len(ids), ids.shape[1] // slices, model.d_model) for ids in tokens]


def _model_arguments(batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments of every stage.

    They include positions: under sequence parallelism a later stage receives only a slice of the tokens and cannot
    derive them.
    """
    arguments = batch.forward_arguments()
    if batch.positions_BS is None:
        positions_BS = torch.arange(batch.inputs_BS.shape[1], device=batch.inputs_BS.device)
        arguments["positions_BS"] = positions_BS.expand_as(batch.inputs_BS)
    return arguments if batch.encoder_input is None else arguments | {"tokens_BS": batch.inputs_BS}


class TiedEmbeddingGroup:
    """The stages that hold the token embedding. Their gradients are summed, so their weights stay equal."""

    def __init__(self, model_parts: Sequence[Decoder], mesh: DeviceMesh, stage_ranks: Sequence[int]) -> None:
        self.weights = [model_part.embed.tokens.weight for model_part in model_parts if model_part.embed is not None]
        self.group: dist.ProcessGroup | None = None
        # Every rank must call new_group for every group.
        columns = mesh.mesh.flatten(1).t().tolist()  # mesh dimension 0 is pp
        for column in columns:
            ranks = [column[stage_rank] for stage_rank in stage_ranks]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                self.group = group

    def reduce_grads(self) -> None:
        """Sum the gradients of the token embedding over all stages that hold it."""
        grads = [to_local(weight.grad) for weight in self.weights if weight.grad is not None]
        if not grads:
            return
        # A rank may hold the embedding twice: in zbv the first rank has both ends.
        total = grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(total, group=self.group)
        for grad in grads:
            if grad is not total:
                grad.copy_(total)
