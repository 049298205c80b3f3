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
from dist_llm.config.check_layers import check_each_kind, check_layers, check_one_layer, check_residuals
from dist_llm.config.check_layout import check_budget, check_layout
from dist_llm.config.check_moe import check_moe
from dist_llm.config.check_param_groups import check_param_groups
from dist_llm.config.compare import check_init
from dist_llm.config.derive import AXES, format_layout
from dist_llm.config.load import Violation
from dist_llm.config.model_section import UnresolvedModelConfig
from dist_llm.config.objective_sections import CausalSpec, MixtureConfig, RegisteredObjectiveSpec
from dist_llm.config.optim_sections import DecayKeys
from dist_llm.config.parametrization import check_parametrization
from dist_llm.config.registered_classes import check_registered_objective
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.config.sequence_lengths import compute_inputs_len, compute_sequence_lengths, count_objective_ids

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
    objective_violations = list(_check_objective(config))
    data_violations = list(check_data(config))
    if objective_violations:
        # Sequence lengths and special tokens depend on the objective: check the other rules with a valid objective.
        config = config.model_copy(
            update={
                "objective": CausalSpec(),
                "model": config.model.model_copy(update={"architecture": "decoder"}),
            }
        )
    violations = [
        *objective_violations,
        *data_violations,
        *check_layers(config.model),
        *check_each_kind(config, check_one_layer),
        *check_each_kind(config, check_moe),
        *check_residuals(config.model),
        *_check_relative_positions(config.model),
        *_check_vocab_and_lengths(config, tokenizer_size),
        *_check_schedule(config),
        *_check_checkpoints(config),
        *check_init(config),
        *_check_optim(config),
        *check_param_groups(config),
        *check_parametrization(config),
        *check_budget(config.parallel),
        *check_guard(config),
        *check_engine(config, world_size),
        *check_fp8(config),
        *check_effect(config),
    ]
    layout_violations = list(check_layout(config, world_size, tokenizer_size))
    if layout_violations and (layouts := find_nearest_layouts(config, world_size, tokenizer_size)):
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        suggestion = f"parallel: valid layouts of {ranks}: {'; '.join(map(format_layout, layouts))}"
        last = layout_violations[-1]
        layout_violations[-1] = RefusedLayout(last.keys, last.message, suggestion)
    return violations + layout_violations


def find_nearest_layouts(
    config: UnresolvedConfig, world_size: int, tokenizer_size: int, max_layouts: int = 3
) -> list[dict[str, int]]:
    """Return at most `max_layouts` valid layouts of `world_size` ranks, sorted by distance from the requested layout.

    The distance counts first the axes of another size, then the factors between old and new sizes, then the ranks that
    are not data parallel. A dp_shard of null may take any size.
    """
    requested = {axis: size for axis in AXES if (size := getattr(config.parallel, axis))}

    def distance(sizes: dict[str, int]) -> tuple[int, float, int]:
        factors = [abs(math.log2(sizes[axis] / size)) for axis, size in requested.items()]
        return sum(factor > 0 for factor in factors), sum(factors), sizes["pp"] * sizes["cp"] * sizes["tp"]

    layouts: list[dict[str, int]] = []
    for sizes in sorted(
        (dict(zip(AXES, factors, strict=True)) for factors in _factorizations(world_size, len(AXES))), key=distance
    ):
        layout = config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})
        if not any(check_layout(layout, world_size, tokenizer_size)) and not any(check_axes(layout)):
            layouts.append(sizes)
            if len(layouts) == max_layouts:
                break
    return layouts


def _factorizations(product: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    """Yield all ordered factorizations of `product` into `num_factors` factors."""
    if num_factors == 1:
        yield (product,)
        return
    for factor in range(1, product + 1):
        if product % factor == 0:
            for remaining_factors in _factorizations(product // factor, num_factors - 1):
                yield (factor, *remaining_factors)


def _check_relative_positions(model: UnresolvedModelConfig) -> Iterator[Violation]:
    # An encoder uses half of its buckets for each direction. Half of the buckets of a direction hold a single distance.
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
    for index, spec in enumerate(config.objective.components):
        section = f"objective.mixture.{index}" if isinstance(config.objective, MixtureConfig) else "objective"
        if isinstance(spec, RegisteredObjectiveSpec):
            yield from check_registered_objective(spec, section)
            if architecture != "decoder":
                yield Violation(
                    (f"{section}.name", "model.architecture"),
                    f"an objective of another package needs model.architecture decoder, not {architecture}",
                )
            continue
        if spec.name not in ALLOWED_OBJECTIVES[architecture]:
            architectures = [name for name, objectives in ALLOWED_OBJECTIVES.items() if spec.name in objectives]
            yield Violation(
                (f"{section}.name", "model.architecture"),
                f"{spec.name} is not an objective for model.architecture {architecture}, which supports "
                f"{' or '.join(ALLOWED_OBJECTIVES[architecture])}; {spec.name} needs {' or '.join(architectures)}",
            )
            continue
        try:
            compute_sequence_lengths(spec, architecture, config.data.seq_len)
        except ValueError as error:
            yield Violation(("data.seq_len", f"{section}.name"), f"{config.data.seq_len} is too short: {error}")


def _check_vocab_and_lengths(config: UnresolvedConfig, tokenizer_size: int) -> Iterator[Violation]:
    vocab_size, max_seq_len = config.model.vocab_size, config.model.max_seq_len
    num_objective_ids = count_objective_ids(config)
    if vocab_size and vocab_size < (min_vocab_size := tokenizer_size + num_objective_ids):
        objective_ids = f" and {num_objective_ids} of the objective" if num_objective_ids else ""
        yield Violation(
            ("model.vocab_size",),
            f"{vocab_size} is smaller than the {tokenizer_size} ids of the corpus's tokenizer{objective_ids}; "
            f"set at least {min_vocab_size}, or null to derive it",
        )
    longest_input = max(config.data.seq_len, compute_inputs_len(config))
    if max_seq_len and max_seq_len < longest_input:
        yield Violation(
            ("data.seq_len", "model.max_seq_len"),
            f"{longest_input} is longer than model.max_seq_len {max_seq_len}; lower it, or set max_seq_len to null",
        )


def _check_schedule(config: UnresolvedConfig) -> Iterator[Violation]:
    schedule = config.schedule
    # A short trial of a long run (run.steps=20) may end within the warmup: only decay_steps is checked.
    if isinstance(schedule, DecayKeys) and schedule.decay_steps and schedule.decay_steps < schedule.warmup_steps:
        warmup_steps, decay_steps = schedule.warmup_steps, schedule.decay_steps
        yield Violation(
            ("schedule.warmup_steps", "schedule.decay_steps"),
            f"the warmup ends at step {warmup_steps}, after the decay at step {decay_steps}; set at most {decay_steps}",
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
