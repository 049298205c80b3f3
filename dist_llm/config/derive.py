"""Derive the values of config keys that are null, and compute the sizes of parallel layouts."""

import math
from collections.abc import Iterator, Sequence

from dist_llm.config.data_sections import DataConfig
from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.optim_sections import DecayKeys, ScheduleConfig
from dist_llm.config.parallel_section import ParallelConfig, UnresolvedParallelConfig
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.config.sequence_lengths import compute_inputs_len, count_objective_ids

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
TWO_STAGE_SCHEDULES = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv")  # each rank has two stages
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv")  # compute activation gradients first, weight gradients later


def can_split_backward(version: str) -> bool:
    """Return whether this torch version can split backward of an autograd.Function, which FSDP and the loss use."""
    return not version.startswith(("2.11.", "2.12."))


def resolve_config(config: UnresolvedConfig, world_size: int, tokenizer_size: int) -> Config:
    """Derive all sizes of a config that has passed `check`. `tokenizer_size` is the number of ids of the tokenizer."""
    model, data, parallel = config.model, config.data, config.parallel
    dp_shard = resolve_dp_shard(parallel, world_size)
    samples_per_rank = data.global_batch // (parallel.dp_replicate * dp_shard)
    sections = {
        "model": resolve_model(
            model,
            vocab_size=tokenizer_size + count_objective_ids(config),
            max_seq_len=max(data.seq_len, compute_inputs_len(config)),
        ),
        "data": DataConfig.model_validate({**dict(data), "micro_batch": data.micro_batch or samples_per_rank}),
        "parallel": ParallelConfig.model_validate({**dict(parallel), "dp_shard": dp_shard}),
    }
    return Config.model_validate({**dict(config), **sections, "schedule": resolve_schedule(config)})


def resolve_model(model: UnresolvedModelConfig, vocab_size: int = 0, max_seq_len: int = 0) -> ModelConfig:
    """Derive the sizes of a model. `vocab_size` and `max_seq_len` are used where the model has null."""
    sizes = {
        "n_encoder_layers": count_encoder_layers(model),
        "n_kv_heads": model.n_kv_heads or model.n_heads,
        "head_dim": model.head_dim or model.d_model // model.n_heads,
        "d_ff": resolve_d_ff(model),
        "vocab_size": model.vocab_size or vocab_size,
        "max_seq_len": model.max_seq_len or max_seq_len,
    }
    return ModelConfig.model_validate({**dict(model), **sizes})


def resolve_schedule(config: UnresolvedConfig, planned: ScheduleConfig | None = None) -> ScheduleConfig:
    """Return the schedule with its decay_steps.

    If decay_steps is null, the decay ends at run.steps; on a resume with schedule.on_extend=keep, at the decay_steps of
    `planned`, the schedule of the checkpoint.
    """
    schedule = config.schedule
    if not isinstance(schedule, DecayKeys) or schedule.decay_steps:
        return schedule
    steps = config.run.steps
    if isinstance(planned, DecayKeys) and planned.decay_steps and schedule.on_extend == "keep":
        steps = planned.decay_steps
    return schedule.model_copy(update={"decay_steps": steps})


def iter_layer_models(model: UnresolvedModelConfig) -> Iterator[tuple[str | None, UnresolvedModelConfig]]:
    """Yield (kind, model with the keys of this kind) for each kind that layers have; (None, model) without kinds.

    A kind inherits sizes that are derived from the keys of `model`.
    """
    if not model.layers:
        yield None, model
        return
    head_dim = model.head_dim or model.d_model // model.n_heads
    sizes = {"n_kv_heads": model.n_kv_heads or model.n_heads, "head_dim": head_dim, "d_ff": resolve_d_ff(model)}
    for kind in dict.fromkeys(name for name in model.layers if name in model.kinds):
        yield kind, model.model_copy(update=sizes).with_kind(kind)


def count_rotated_dims(model: UnresolvedModelConfig) -> int:
    """Return the number of dimensions of a head that rotate with rotary positions."""
    return int((model.head_dim or model.d_model // model.n_heads) * model.rotary_fraction)


def count_encoder_layers(model: UnresolvedModelConfig) -> int:
    """Return the number of encoder blocks of an encoder-decoder; 0 for other architectures."""
    return (model.n_encoder_layers or model.n_layers) if model.architecture == "encoder_decoder" else 0


def resolve_d_ff(model: UnresolvedModelConfig) -> int:
    """Return the hidden size of the feed-forward layer, derived from d_model if model.d_ff is null."""
    if model.d_ff:
        return model.d_ff
    return round_up(math.ceil(8 / 3 * model.d_model), 64) if is_gated(model) else 4 * model.d_model


def is_gated(model: UnresolvedModelConfig) -> bool:
    """Return whether the feed-forward layer multiplies its activation with a second projection (a gate)."""
    return model.activation in ("swiglu", "swiglu_clamped", "geglu", "geglu_tanh")


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def resolve_dp_shard(parallel: UnresolvedParallelConfig, world_size: int) -> int:
    """Return the sharding degree. null means all ranks that the other mesh dimensions leave, at least 1."""
    other_ranks = parallel.dp_replicate * parallel.cp * parallel.tp * parallel.pp
    return parallel.dp_shard or max(1, world_size // other_ranks)


def format_divisors(dividend: int) -> str:
    """Format the divisors of `dividend` for messages, as `1, 2, 3, 6`; a long list is shortened in the middle."""
    divisors = [divisor for divisor in range(1, dividend + 1) if dividend % divisor == 0]
    entries: Sequence[int | str] = divisors if len(divisors) <= 12 else [*divisors[:8], "...", *divisors[-3:]]
    return ", ".join(map(str, entries))


def format_layout(sizes: dict[str, int]) -> str:
    """Format the mesh dimensions that are larger than 1, as `dp_shard 4 x tp 2`."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "dp_shard 1"
