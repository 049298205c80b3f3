"""Check rules that involve several keys, the corpus or the world size.

`check` reports all violations before any process group starts. `derive.py:resolve_config` then derives the keys that
are null.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dist_llm.config.check_data import check_data
from dist_llm.config.check_effect import check_effect
from dist_llm.config.check_engine import check_axes, check_engine
from dist_llm.config.check_fp8 import check_fp8
from dist_llm.config.check_guard import check_guard
from dist_llm.config.check_layout import check_budget, check_layout
from dist_llm.config.compare import check_init
from dist_llm.config.derive import AXES, format_divisors, format_layout
from dist_llm.config.lengths import extra_ids, inputs_len, lengths
from dist_llm.config.load import Violation
from dist_llm.config.model_section import UnresolvedModelConfig
from dist_llm.config.objective_sections import CausalSpec, MixtureConfig
from dist_llm.config.optim_sections import DecayKeys
from dist_llm.config.schema import UnresolvedConfig

ALLOWED_OBJECTIVES = {
    "decoder": ("causal", "prefix", "span", "fim"),
    "encoder": ("masked",),
    "encoder_decoder": ("prefix", "span"),
}


@dataclass(frozen=True)
class RefusedLayout(Violation):
    """A violation of the layout, followed by a line that lists valid layouts."""

    suggestion: str

    def __str__(self) -> str:
        return f"{super().__str__()}\n  {self.suggestion}"


def check(config: UnresolvedConfig, world_size: int, tokenizer_size: int) -> list[Violation]:
    """Return all violations of a run on `world_size` ranks over a corpus with `tokenizer_size` token ids."""
    objective = list(_check_objective(config))
    data = list(check_data(config))
    if objective:
        # Sequence lengths and special tokens depend on the objective: check the other rules with a valid objective.
        config = config.model_copy(
            update={
                "objective": CausalSpec(),
                "model": config.model.model_copy(update={"architecture": "decoder"}),
            }
        )
    rules = [
        *objective,
        *data,
        *_check_model(config.model),
        *_check_relative(config.model),
        *_check_lengths(config, tokenizer_size),
        *_check_schedule(config),
        *_check_checkpoints(config),
        *check_init(config),
        *_check_optim(config),
        *check_budget(config.parallel),
        *check_guard(config),
        *check_engine(config, world_size),
        *check_fp8(config),
        *check_effect(config),
    ]
    layout = list(check_layout(config, world_size, tokenizer_size))
    if layout and (valid := nearest_layouts(config, world_size, tokenizer_size)):
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        line = f"parallel: valid layouts of {ranks}: {'; '.join(map(format_layout, valid))}"
        layout[-1] = RefusedLayout(layout[-1].keys, layout[-1].message, line)
    return rules + layout


def nearest_layouts(
    config: UnresolvedConfig, world_size: int, tokenizer_size: int, limit: int = 3
) -> list[dict[str, int]]:
    """Return at most `limit` valid layouts of `world_size` ranks, those nearest to the config's layout first.

    The order: the fewest axes of another size, then the smallest factors between old and new sizes, then the most data
    parallelism. A dp_shard of null may take any size.
    """
    requested = {axis: size for axis in AXES if (size := getattr(config.parallel, axis))}

    def distance(sizes: dict[str, int]) -> tuple[int, float, int]:
        factors = [abs(math.log2(sizes[axis] / size)) for axis, size in requested.items()]
        return sum(factor > 0 for factor in factors), sum(factors), sizes["pp"] * sizes["cp"] * sizes["tp"]

    layouts: list[dict[str, int]] = []
    for sizes in sorted(
        (dict(zip(AXES, each, strict=True)) for each in _factorizations(world_size, len(AXES))), key=distance
    ):
        layout = config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})
        if not any(check_layout(layout, world_size, tokenizer_size)) and not any(check_axes(layout)):
            layouts.append(sizes)
            if len(layouts) == limit:
                break
    return layouts


def _factorizations(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yield all ordered factorizations of `number` into `count` factors."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factorizations(number // first, count - 1))


def _check_model(model: UnresolvedModelConfig) -> Iterator[Violation]:
    if not model.head_dim and model.d_model % model.n_heads:
        yield Violation(
            ("model.n_heads", "model.d_model", "model.head_dim"),
            f"{model.n_heads} heads do not divide d_model {model.d_model}; set n_heads to one of "
            f"{format_divisors(model.d_model)}, or set model.head_dim",
        )
    elif model.positions == "rope" and (model.head_dim or model.d_model // model.n_heads) % 2:
        yield Violation(
            ("model.n_heads", "model.d_model", "model.head_dim", "model.positions"),
            "rope rotates pairs of dimensions, but a head has "
            f"{model.head_dim or model.d_model // model.n_heads} dimensions; make d_model / n_heads even",
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield Violation(
            ("model.n_kv_heads", "model.n_heads"),
            f"{model.n_kv_heads} key-value heads do not divide {model.n_heads} query heads; "
            f"set one of {format_divisors(model.n_heads)}",
        )


def _check_relative(model: UnresolvedModelConfig) -> Iterator[Violation]:
    num_directions = 1 if model.architecture == "decoder" else 2
    num_exact = model.relative_buckets // (2 * num_directions)
    if model.positions == "relative" and (num_exact < 1 or model.relative_distance <= num_exact):
        yield Violation(
            ("model.relative_buckets", "model.relative_distance", "model.positions"),
            f"{model.relative_buckets} buckets give {num_exact} exact distances, but relative_distance is "
            f"{model.relative_distance}; set at least {2 * num_directions} buckets, and a relative_distance above "
            f"the number of buckets / {2 * num_directions}",
        )


def _check_objective(config: UnresolvedConfig) -> Iterator[Violation]:
    architecture = config.model.architecture
    if config.model.n_encoder_layers and architecture != "encoder_decoder":
        yield Violation(
            ("model.n_encoder_layers", "model.architecture"),
            f"only used with an encoder_decoder, but this is a {architecture}; remove the key",
        )
    for number, each in enumerate(config.objective.components):
        where = f"objective.mixture.{number}" if isinstance(config.objective, MixtureConfig) else "objective"
        if each.name not in ALLOWED_OBJECTIVES[architecture]:
            architectures = [name for name, objectives in ALLOWED_OBJECTIVES.items() if each.name in objectives]
            yield Violation(
                (f"{where}.name", "model.architecture"),
                f"{each.name} is not an objective for model.architecture {architecture}, which supports "
                f"{' or '.join(ALLOWED_OBJECTIVES[architecture])}; {each.name} needs {' or '.join(architectures)}",
            )
            continue
        try:
            lengths(each, architecture, config.data.seq_len)
        except ValueError as error:
            yield Violation(("data.seq_len", f"{where}.name"), f"{config.data.seq_len} is too short: {error}")


def _check_lengths(config: UnresolvedConfig, tokenizer_size: int) -> Iterator[Violation]:
    vocab, max_seq_len, extra = config.model.vocab_size, config.model.max_seq_len, extra_ids(config)
    if vocab and vocab < tokenizer_size + extra:
        more = f" and {extra} of the objective" if extra else ""
        yield Violation(
            ("model.vocab_size",),
            f"{vocab} is smaller than the {tokenizer_size} ids of the corpus's tokenizer{more}; "
            f"set at least {tokenizer_size + extra}, or null to derive it",
        )
    needed = max(config.data.seq_len, inputs_len(config))
    if max_seq_len and max_seq_len < needed:
        yield Violation(
            ("data.seq_len", "model.max_seq_len"),
            f"{needed} is longer than model.max_seq_len {max_seq_len}; lower it, or set max_seq_len to null",
        )


def _check_schedule(config: UnresolvedConfig) -> Iterator[Violation]:
    schedule = config.schedule
    # A short trial of a long run (run.steps=20) may end within the warmup: only decay_steps is checked.
    if isinstance(schedule, DecayKeys) and schedule.decay_steps and schedule.decay_steps < schedule.warmup_steps:
        warmup, end = schedule.warmup_steps, schedule.decay_steps
        yield Violation(
            ("schedule.warmup_steps", "schedule.decay_steps"),
            f"the warmup ends at step {warmup}, after the decay at step {end}; set at most {end}",
        )


def _check_optim(config: UnresolvedConfig) -> Iterator[Violation]:
    if config.optim.name == "muon" and config.parallel.cpu_offload:
        yield Violation(
            ("optim.name", "parallel.cpu_offload"),
            "muon does not support parallel.cpu_offload; set optim.name=adamw, or cpu_offload=false",
        )


def _check_checkpoints(config: UnresolvedConfig) -> Iterator[Violation]:
    save_interval, eval_interval = config.checkpoint.every, config.eval.every
    if config.checkpoint.keep_best and (not save_interval or not eval_interval or save_interval % eval_interval):
        yield Violation(
            ("checkpoint.keep_best", "checkpoint.every", "eval.every"),
            f"each checkpoint needs an evaluation of its step, but eval.every is {eval_interval or 'off'} and "
            f"checkpoint.every is {save_interval or 'off'}; set eval.every to a divisor of checkpoint.every",
        )
