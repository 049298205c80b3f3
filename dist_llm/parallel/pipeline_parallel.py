"""Pipeline parallelism: the layers of each stage, and the schedule that runs a global batch through the stages.

A stage is a range of consecutive blocks. A rank holds one stage, or two with an interleaved schedule.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules

from dist_llm.config.derive import TWO_STAGE_SCHEDULES
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.models.block import Block
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
BACKWARDS = (schedules.FULL_BACKWARD, schedules.BACKWARD_WEIGHT)  # actions that free the activations of a microbatch


def count_stages(schedule: str, pp_size: int) -> int:
    """Return the number of stages of all ranks."""
    return pp_size * (2 if schedule in TWO_STAGE_SCHEDULES else 1)


def stages_of_rank(schedule: str, pp_rank: int, pp_size: int) -> list[int]:
    """Return the stage indices of a pipeline rank.

    In schedule `zbv` the stages run from the first rank to the last and back, so rank 0 holds the first and last stage.
    """
    if schedule == "zbv":
        return [pp_rank, 2 * pp_size - 1 - pp_rank]
    return list(range(pp_rank, count_stages(schedule, pp_size), pp_size))


def split_layers(model: ModelConfig, num_stages: int, balance: str) -> list[range]:
    """Assign a range of blocks to each stage, at least one block per stage.

    `balance` "count" gives all stages the same number of blocks, and "cost" gives all stages the same work. The unit of
    work is the first block. Another block costs (its weights) / (weights of the first block), and so does the head. The
    embedding costs a tenth of the head, because its only expensive operation is the weight update. In an
    encoder-decoder, the blocks of the encoder come first, and a decoder block counts as much as an encoder block.
    """
    num_blocks = model.n_encoder_layers + model.n_layers
    weights = [Block.cost(model.layer_config(layer)).weights for layer in range(num_blocks)]
    block_costs = [num / weights[0] if balance == "cost" else 1.0 for num in weights]
    head = model.vocab_size * model.d_model / weights[0] if balance == "cost" else 0.0
    # cost_before[i] is the work before block i. It begins with the embedding.
    cost_before = [0.1 * head + before for before in accumulate(block_costs, initial=0.0)]
    cost_per_stage = (cost_before[-1] + head) / num_stages
    cuts = [0]
    for stage in range(1, num_stages):
        nearest = min(range(num_blocks + 1), key=lambda layer: abs(cost_before[layer] - stage * cost_per_stage))
        # Leave at least one block for this stage and for each later stage.
        cuts.append(min(max(nearest, cuts[-1] + 1), num_blocks - (num_stages - stage)))
    cuts.append(num_blocks)
    return [range(start, end) for start, end in pairwise(cuts)]


class Pipeline:
    """The pipeline stages of this rank, and the schedule over all stages."""

    def __init__(self, config: Config, mesh: DeviceMesh, model_parts: Sequence[Decoder], device: torch.device) -> None:
        parallel = config.parallel
        self.config, self.device, self.schedule_name = config, device, parallel.pp_schedule
        self.group, self.pp_size = mesh.get_group("pp"), parallel.pp
        local_stages = stages_of_rank(self.schedule_name, mesh.get_local_rank("pp"), self.pp_size)
        # Stage index -> model part, in the order of the stages.
        self.model_parts = dict(zip(local_stages, model_parts, strict=True))
        self.num_stages = count_stages(self.schedule_name, self.pp_size)
        self.layers = split_layers(config.model, self.num_stages, parallel.pp_split)
        self.has_first_stage, self.has_last_stage = 0 in local_stages, self.num_stages - 1 in local_stages
        samples_per_rank = config.data.global_batch // (parallel.dp_replicate * parallel.dp_shard)
        stages = [
            PipelineStage(model_part, stage, self.num_stages, device, group=self.group)
            for stage, model_part in self.model_parts.items()
        ]
        self.denominator, self.losses = torch.ones((), device=device), list[Tensor]()
        self.schedule = SCHEDULES[self.schedule_name](
            stages if self.schedule_name in TWO_STAGE_SCHEDULES else stages[0],
            samples_per_rank // config.data.micro_batch,
            loss_fn=self._record_losses,
            scale_grads=False,  # torch would divide gradients by the number of microbatches
        )
        embedding_stages = [stage for stage in range(self.num_stages) if self._has_token_embedding(stage)]
        self.tied_embedding = None
        if len(embedding_stages) > 1:
            self.tied_embedding = TiedEmbeddingGroup(
                model_parts, mesh, sorted({self.rank_of_stage(stage) for stage in embedding_stages})
            )

    def accumulate(self, batches: Sequence[Batch], denominator: Tensor) -> Tensor:
        """Run forward and backward of all microbatches.

        Return the loss of each sequence divided by `denominator`, [B]; zeros on ranks without the last stage.
        """
        self.denominator, self.losses = denominator, []
        full_batch = Batch.concatenate(batches)
        microbatch_losses: list[Tensor] = []
        self.schedule.step(
            *((full_batch.inputs_BS,) if self.has_first_stage else ()),
            target=full_batch.targets_BS if self.has_last_stage else None,
            losses=microbatch_losses if self.has_last_stage else None,
            return_outputs=False,
            **_stage_arguments(full_batch),
        )
        # In the first step, torch also calls the loss on placeholder values to infer shapes. Those losses come first.
        losses = self.losses[-len(microbatch_losses) :]
        return torch.cat(losses) if self.has_last_stage else torch.zeros(len(full_batch.inputs_BS), device=self.device)

    def _record_losses(self, losses_B: Tensor, targets_BS: Tensor) -> Tensor:
        """Record the losses of a microbatch, which the last stage outputs, and return their sum.

        Every schedule runs the forward passes of the microbatches in order.
        """
        losses_B = losses_B / self.denominator
        self.losses.append(losses_B.detach())
        return losses_B.sum()

    def reduce_tied_grads(self) -> None:
        """Sum the gradients of a tied embedding over its stages. Call this after FSDP has reduced the gradients."""
        if self.tied_embedding is not None:
            self.tied_embedding.reduce_grads()

    def score(self, batch: Batch) -> Tensor:
        """Run only the forward pass, stage after stage.

        Return the sum of losses of each sequence, [B]; zeros on ranks without the last stage. This method does
        not use the schedule, because the schedule `zbv` of torch deadlocks without backward passes. The work of the
        ranks still overlaps: each rank continues with the next batch as soon as it has sent its output.
        """
        hidden: tuple[Tensor, ...] = (batch.inputs_BS,)
        for stage, model_part in self.model_parts.items():
            if stage > 0 and stage - 1 not in self.model_parts:
                hidden = tuple(torch.empty(shape, device=self.device) for shape in self._input_shapes(batch, stage))
                for x in hidden:
                    dist.recv(x, group=self.group, group_src=self.rank_of_stage(stage - 1))
            outputs = model_part(*hidden, **_stage_arguments(batch))
            hidden = outputs if isinstance(outputs, tuple) else (outputs,)
            if stage + 1 < self.num_stages and stage + 1 not in self.model_parts:
                for x in hidden:
                    dist.send(
                        x.to(torch.get_default_dtype()).contiguous(),
                        group=self.group,
                        group_dst=self.rank_of_stage(stage + 1),
                    )
        return hidden[0] if self.has_last_stage else torch.zeros(len(batch.inputs_BS), device=self.device)

    def dry_run_forward(self, batch: Batch) -> list[Tensor]:
        """Run each stage of this rank on one microbatch, independently of the other stages.

        Return the placeholder inputs, which replace the outputs of the previous stages.
        """
        inputs: list[Tensor] = []
        for stage, model_part in self.model_parts.items():
            hidden: tuple[Tensor, ...] = (batch.inputs_BS,)
            if stage > 0:
                shapes = self._input_shapes(batch, stage)
                hidden = tuple(torch.zeros(shape, device=self.device, requires_grad=True) for shape in shapes)
                inputs += hidden
            model_part(*hidden, **_stage_arguments(batch))
        return inputs

    def peak_in_flight(self, sizes: Sequence[int]) -> int:
        """Return the peak of the saved bytes over the schedule. `sizes`: bytes of one microbatch, per model part.

        A stage frees the saved bytes of a microbatch at the end of the backward pass. If the schedule splits the
        backward pass in two, it frees them at the end of the weight backward.
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

    def rank_of_stage(self, stage: int) -> int:
        """Return the pipeline rank that holds a stage."""
        return next(
            rank for rank in range(self.pp_size) if stage in stages_of_rank(self.schedule_name, rank, self.pp_size)
        )

    def _has_token_embedding(self, stage: int) -> bool:
        """Return whether a stage holds the token embedding: it embeds tokens, or its head is tied to the embedding."""
        model = self.config.model
        has_tied_head = stage == self.num_stages - 1 and model.tie_embeddings
        begins_decoder = model.n_encoder_layers > 0 and model.n_encoder_layers in self.layers[stage]
        return stage == 0 or has_tied_head or begins_decoder

    def _input_shapes(self, batch: Batch, stage: int) -> list[tuple[int, int, int]]:
        """Return the shapes [B, S, D] of the activations that a stage receives.

        The first one is the output of the encoder, if the model has an encoder. Then come the activations of the
        decoder, if an earlier stage has begun the decoder. Under sequence parallelism S is split over the tensor ranks.
        """
        parallel, model = self.config.parallel, self.config.model
        num_slices = parallel.tp if parallel.sequence_parallel else 1
        tokens = [batch.encoder_input.tokens_BT] if batch.encoder_input is not None else []
        if self.layers[stage].start > model.n_encoder_layers or not tokens:
            tokens.append(batch.inputs_BS)
        return [(len(ids), ids.shape[1] // num_slices, model.d_model) for ids in tokens]


def _stage_arguments(batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments for the forward pass of every stage.

    The positions of all tokens are among them. Under sequence parallelism, a stage after the first receives only a
    slice of the tokens, and could not compute the positions.
    """
    arguments = batch.forward_arguments()
    if batch.positions_BS is None:
        positions_BS = torch.arange(batch.inputs_BS.shape[1], device=batch.inputs_BS.device)
        arguments["positions_BS"] = positions_BS.expand_as(batch.inputs_BS)
    return arguments if batch.encoder_input is None else arguments | {"tokens_BS": batch.inputs_BS}


class TiedEmbeddingGroup:
    """The pipeline ranks that hold a copy of the token embedding.

    The gradients of all copies are summed, so the copies stay equal.
    """

    def __init__(self, model_parts: Sequence[Decoder], mesh: DeviceMesh, pp_ranks: Sequence[int]) -> None:
        self.weights = [model_part.embed.tokens.weight for model_part in model_parts if model_part.embed is not None]
        self.group: dist.ProcessGroup | None = None
        # Every rank must call new_group for every group.
        pipelines = mesh.mesh.flatten(1).t().tolist()  # global ranks by pipeline; axis 0 of the mesh is pp
        for pipeline_ranks in pipelines:
            ranks = [pipeline_ranks[pp_rank] for pp_rank in pp_ranks]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                self.group = group

    def reduce_grads(self) -> None:
        """Sum the gradients of the token embedding over all stages that hold it."""
        grads = [to_local(weight.grad) for weight in self.weights if weight.grad is not None]
        if not grads:
            return
        # A rank may hold the embedding twice: in zbv the first rank has the first and the last stage.
        total = grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(total, group=self.group)
        for grad in grads:
            if grad is not total:
                grad.copy_(total)
