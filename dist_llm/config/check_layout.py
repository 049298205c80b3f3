"""Check how ranks, batches and matrices divide over the axes of the layout, and the rules of pipelines."""

import math
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

from dist_llm.config.check_fp8 import check_fp8_sizes
from dist_llm.config.check_layers import check_each_kind, check_layer_layout, indivisible_by_tp
from dist_llm.config.check_moe import check_expert_layout
from dist_llm.config.derive import (
    AXES,
    SPLIT_BACKWARD,
    TWO_STAGE_SCHEDULES,
    can_split_backward,
    count_encoder_layers,
    format_layout,
    resolve_dp_shard,
    round_up,
)
from dist_llm.config.load import Violation
from dist_llm.config.parallel_section import UnresolvedParallelConfig
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.config.sequence_lengths import count_objective_ids


def check_layout(config: UnresolvedConfig, world_size: int, tokenizer_size: int) -> Iterator[Violation]:
    """Yield violations of the layout: ranks, batches, matrices and layers must divide over the mesh dimensions."""
    parallel = config.parallel
    sizes = {axis: getattr(parallel, axis) for axis in AXES} | {"dp_shard": resolve_dp_shard(parallel, world_size)}
    num_layout_ranks = math.prod(sizes.values())
    if num_layout_ranks != world_size:
        yield Violation(
            tuple(f"parallel.{axis}" for axis in ("dp_shard", "dp_replicate", "cp", "tp", "pp")),
            f"the layout ({format_layout(sizes)}) needs {num_layout_ranks} ranks, but {world_size} were started; set "
            f"dp_shard to null, or start with: torchrun --nproc-per-node {num_layout_ranks} -m dist_llm train ...",
        )
    yield from _check_batch(config, sizes["dp_replicate"] * sizes["dp_shard"])
    yield from check_each_kind(config, check_layer_layout)
    num_expert_ranks = sizes["dp_shard"] * parallel.cp * parallel.tp
    yield from check_each_kind(config, partial(check_expert_layout, num_ranks=num_expert_ranks))
    yield from _check_tensor_parallel(config, tokenizer_size)
    yield from check_each_kind(config, check_fp8_sizes)
    yield from _check_context_parallel(config)
    yield from _check_pipeline(config, sizes["dp_replicate"] * sizes["dp_shard"])


def check_budget(parallel: UnresolvedParallelConfig) -> Iterator[Violation]:
    """Yield a violation if both an activation budget and a recompute mode are set."""
    if parallel.activations_gib and parallel.recompute != "none":
        yield Violation(
            ("parallel.activations_gib", "parallel.recompute"),
            "the activation budget chooses what each block recomputes; set recompute to none, or activations_gib to "
            "off",
        )


def _check_batch(config: UnresolvedConfig, num_data_ranks: int) -> Iterator[Violation]:
    micro_batch, global_batch = config.data.micro_batch or 1, config.data.global_batch
    divisor = num_data_ranks * micro_batch
    if global_batch % divisor:
        yield Violation(
            ("data.global_batch", "data.micro_batch", "parallel.dp_shard", "parallel.dp_replicate"),
            f"{global_batch} sequences do not divide into {num_data_ranks} data-parallel ranks x micro-batches of "
            f"{micro_batch}; the nearest that do: {_format_nearest_multiples(global_batch, divisor)}",
        )


def _format_nearest_multiples(number: int, divisor: int) -> str:
    """Format the multiples of `divisor` below and above `number`, as `8 or 12`. 0 is left out."""
    if number <= divisor:
        return str(divisor)
    return f"{number // divisor * divisor} or {round_up(number, divisor)}"


def _check_tensor_parallel(config: UnresolvedConfig, tokenizer_size: int) -> Iterator[Violation]:
    model, tp = config.model, config.parallel.tp
    num_vocab_rows = round_up(model.vocab_size or tokenizer_size + count_objective_ids(config), model.vocab_multiple)
    if num_vocab_rows % tp:
        yield indivisible_by_tp(("model.vocab_multiple",), "vocabulary rows", num_vocab_rows, tp)
    # The input length of an encoder-decoder's decoder is already rounded up to a multiple of tp.
    if tp > 1 and config.parallel.sequence_parallel and config.data.seq_len % (tp * config.parallel.cp):
        yield Violation(
            ("data.seq_len", "parallel.tp", "parallel.cp", "parallel.sequence_parallel"),
            f"{config.data.seq_len} tokens do not divide over tp {tp} x cp {config.parallel.cp}; "
            f"set a multiple of {tp * config.parallel.cp}, or sequence_parallel to false",
        )
    if tp > 1 and config.parallel.async_tp and not (config.compile and config.parallel.sequence_parallel):
        yield Violation(
            ("parallel.async_tp", "compile", "parallel.sequence_parallel"),
            "the compiler overlaps the all-gathers and reduce-scatters of sequence_parallel; set compile and "
            "sequence_parallel to true, or async_tp to false",
        )
    recomputes_selectively = config.parallel.recompute == "selective" or config.parallel.activations_gib
    shards_compiled_heads = tp > 1 and not config.parallel.sequence_parallel and config.compile
    if shards_compiled_heads and recomputes_selectively and model.dropout:
        yield Violation(
            ("parallel.recompute", "parallel.activations_gib", "compile", "parallel.sequence_parallel"),
            "a compiled block with selective recomputation cannot draw dropout for only its rank's heads; set "
            "sequence_parallel to true, or compile to false, or recompute to full and activations_gib to off",
        )


def _check_context_parallel(config: UnresolvedConfig) -> Iterator[Violation]:
    num_chunks, seq_len = 2 * config.parallel.cp, config.data.seq_len
    if config.parallel.cp > 1 and config.model.architecture == "encoder_decoder":
        yield Violation(
            ("parallel.cp", "model.architecture"),
            "context parallelism does not support encoder_decoder; set cp to 1",
        )
    if config.parallel.cp > 1 and seq_len % num_chunks:
        yield Violation(
            ("data.seq_len", "parallel.cp"),
            f"{seq_len} tokens do not divide into the {num_chunks} chunks of cp {config.parallel.cp} "
            f"(two per rank); the nearest that do: {_format_nearest_multiples(seq_len, num_chunks)}",
        )


def _check_pipeline(config: UnresolvedConfig, num_data_ranks: int) -> Iterator[Violation]:
    parallel, data = config.parallel, config.data
    if parallel.pp == 1:
        return
    num_stages = parallel.pp * (2 if parallel.pp_schedule in TWO_STAGE_SCHEDULES else 1)
    num_blocks = config.model.n_layers + count_encoder_layers(config.model)
    if num_blocks < num_stages:
        yield Violation(
            ("parallel.pp", "model.n_layers", "parallel.pp_schedule"),
            f"{num_stages} stages ({parallel.pp_schedule}) need at least {num_stages} blocks, but the model has "
            f"{num_blocks}; pp can be at most {num_blocks * parallel.pp // num_stages or 1}",
        )
    if config.model.positions == "relative":
        yield Violation(
            ("parallel.pp", "model.positions"),
            "all layers share one table of relative positions, which cannot be split over stages; set pp to 1, or "
            "positions to rope, learned or sinusoidal",
        )
    samples_per_rank = data.global_batch // num_data_ranks
    num_microbatches = samples_per_rank // (data.micro_batch or max(1, samples_per_rank))
    # Interleaved schedules process the microbatches in groups of pp.
    is_interleaved = parallel.pp_schedule.startswith("interleaved")
    min_microbatches = {"gpipe": 1, "zbv": num_stages}.get(parallel.pp_schedule, parallel.pp)
    if num_microbatches < min_microbatches or (is_interleaved and num_microbatches % parallel.pp):
        rule = f"a multiple of pp {parallel.pp}" if is_interleaved else f"at least {min_microbatches}"
        yield Violation(
            ("data.micro_batch", "data.global_batch", "parallel.pp", "parallel.pp_schedule"),
            f"{parallel.pp_schedule} over pp {parallel.pp} needs {rule} microbatches, but there are "
            f"{num_microbatches}; lower micro_batch or raise global_batch (microbatches = global_batch / data ranks / "
            "micro_batch)",
        )
    if parallel.reduce_each_microbatch:
        yield Violation(
            ("parallel.reduce_each_microbatch", "parallel.pp"),
            "a pipeline reduces gradients once, after its last microbatch; set it to false, or pp to 1",
        )
    if parallel.pp_schedule in SPLIT_BACKWARD:
        yield from _check_split_backward(config)


def _check_split_backward(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations for settings that prevent computing weight gradients after activation gradients."""
    parallel = config.parallel
    if config.model.architecture == "encoder_decoder":
        yield Violation(
            ("parallel.pp_schedule", "model.architecture"),
            f"{parallel.pp_schedule} splits backward in two, which torch does not support for the encoder output: a "
            "stage both uses it and sends it on; set pp_schedule to 1f1b, gpipe or interleaved_1f1b",
        )
    if not can_split_backward(torch_version := version("torch")):
        yield Violation(
            ("parallel.pp_schedule",),
            f"{parallel.pp_schedule} splits backward in two, which torch {torch_version} does not support with FSDP "
            "and the loss; upgrade torch to 2.13 or newer, or set pp_schedule to 1f1b, gpipe or interleaved_1f1b",
        )
    if config.compile:
        yield Violation(
            ("parallel.pp_schedule", "compile"),
            f"{parallel.pp_schedule} splits backward in two, which torch does not support with compiled blocks; "
            "set compile to false, or pp_schedule to 1f1b or interleaved_1f1b",
        )
    if parallel.reshard == "always":
        yield Violation(
            ("parallel.reshard", "parallel.pp_schedule"),
            f"{parallel.pp_schedule} computes weight gradients after activation gradients; with reshard always the "
            "weights are freed in between, and gradients would be wrong; set reshard to default or never, or "
            "pp_schedule to 1f1b, gpipe or interleaved_1f1b",
        )
    if parallel.recompute == "selective":
        yield Violation(
            ("parallel.recompute", "parallel.pp_schedule"),
            f"{parallel.pp_schedule} runs backward twice per block, but activations that selective saves can be read "
            "only once; set recompute to full or none, or pp_schedule to 1f1b or interleaved_1f1b",
        )
