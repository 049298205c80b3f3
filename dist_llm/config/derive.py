"""Derive config values that were left unset, and compute sizes of layouts."""

import math
from collections.abc import Sequence

from dist_llm.config.lengths import extra_ids, inputs_len
from dist_llm.config.optim_sections import DecayKeys, ScheduleConfig
from dist_llm.config.schema import Config, ModelConfig, ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
TWO_STAGE_SCHEDULES = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv")  # each rank has two stages
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv")  # compute activation gradients first, weight gradients later


def splits_backward(version: str) -> bool:
    """Return whether this torch version can split backward of an autograd.Function, which FSDP and the loss use."""
    return not version.startswith(("2.11.", "2.12."))


def resolve(config: Config, world_size: int, tokenizer_size: int) -> Config:
    """Replace every value that means "derive". The config must have passed `check`."""
    model, data, parallel = config.model, config.data, config.parallel
    shard = dp_shard(parallel, world_size)
    ranks = parallel.dp_replicate * shard
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "n_encoder_layers": encoder_layers(model),
                    "n_kv_heads": model.n_kv_heads or model.n_heads,
                    "head_dim": model.head_dim or model.d_model // model.n_heads,
                    "d_ff": derived_d_ff(model),
                    "vocab_size": model.vocab_size or tokenizer_size + extra_ids(config),
                    "max_seq_len": model.max_seq_len or max(data.seq_len, inputs_len(config)),
                }
            ),
            "data": data.model_copy(update={"micro_batch": data.micro_batch or data.global_batch // ranks}),
            "parallel": parallel.model_copy(update={"dp_shard": shard}),
            "schedule": plan_schedule(config).schedule,
        }
    )


def plan_schedule(config: Config, planned: ScheduleConfig | None = None) -> Config:
    """Set schedule.decay_steps if it is 0. The value is run.steps; on a resume with schedule.on_extend=keep it is the
    decay_steps of `planned`, the schedule of the checkpoint."""
    schedule = config.schedule
    if not isinstance(schedule, DecayKeys) or schedule.decay_steps:
        return config
    steps = config.run.steps
    if isinstance(planned, DecayKeys) and planned.decay_steps and schedule.on_extend == "keep":
        steps = planned.decay_steps
    return config.model_copy(update={"schedule": schedule.model_copy(update={"decay_steps": steps})})


def encoder_layers(model: ModelConfig) -> int:
    """Return the number of encoder blocks of an encoder-decoder; 0 for other architectures."""
    return (model.n_encoder_layers or model.n_layers) if model.architecture == "encoder_decoder" else 0


def derived_d_ff(model: ModelConfig) -> int:
    """Return the hidden size of the feed-forward layer, derived from d_model if model.d_ff is 0."""
    if model.d_ff:
        return model.d_ff
    return round_up(math.ceil(8 / 3 * model.d_model), 64) if gated(model) else 4 * model.d_model


def gated(model: ModelConfig) -> bool:
    """Return whether the feed-forward layer multiplies its activation with a second projection (a gate)."""
    return model.activation in ("swiglu", "geglu", "geglu_tanh")


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def dp_shard(parallel: ParallelConfig, world_size: int) -> int:
    """Return the sharding degree. -1 means all ranks that the other axes leave, at least 1."""
    other_axes = parallel.dp_replicate * parallel.cp * parallel.tp * parallel.pp
    return parallel.dp_shard if parallel.dp_shard > 0 else max(1, world_size // other_axes)


def divisors(number: int) -> str:
    """Format the divisors of `number` for messages, as `1, 2, 3, 6`; a long list is shortened in the middle."""
    numbers = [n for n in range(1, number + 1) if number % n == 0]
    shown: Sequence[int | str] = numbers if len(numbers) <= 12 else [*numbers[:8], "...", *numbers[-3:]]
    return ", ".join(map(str, shown))


def shape(sizes: dict[str, int]) -> str:
    """Format the axes of a layout that are larger than 1, as `dp_shard 4 x tp 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "dp_shard 1"
