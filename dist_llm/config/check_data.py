"""Check rules that relate several keys of the `data` section."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from dist_llm.config.data_sections import SourceConfig, UnresolvedDataConfig
from dist_llm.config.load import Violation
from dist_llm.config.schema import UnresolvedConfig

# In each block of this many consecutive samples, each source has exactly its share.
SHARE_BLOCK_SAMPLES = 10_000
ANY_LENGTH_OBJECTIVES = ("causal", "masked")  # objectives that accept text of any length


def list_sources(data: UnresolvedDataConfig) -> tuple[SourceConfig, ...]:
    """Return the corpora of a run. The corpus of `data.path` has an empty name."""
    return data.sources or (SourceConfig.model_construct(name="", path=data.path, weight=1.0, epochs=1.0),)


def check_data(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield all violations of the data section."""
    data = config.data
    if bool(data.path) == bool(data.sources):
        problem = "neither is set" if not data.path else "both are set"
        yield Violation(("data.path", "data.sources"), f"name one corpus in path, or several in sources; {problem}")
    yield from _check_sources(data)
    yield from _check_stages(data)
    for index, (first_sample, end_sample) in enumerate(data.skip):
        if end_sample <= first_sample:
            yield Violation(
                (f"data.skip.{index}",), f"[{first_sample}, {end_sample}) is empty; write [from, to] with from < to"
            )
    if any(after[0] < before[1] for before, after in pairwise(data.skip)):
        yield Violation(("data.skip",), "ranges must ascend and not overlap")
    noncausal_objectives = {spec.name for spec in config.objective.components} - {"causal"}
    if 0 < data.prompt_loss_weight < 1 and noncausal_objectives:
        yield Violation(
            ("data.prompt_loss_weight", "objective.name"),
            f"{' and '.join(sorted(noncausal_objectives))} cannot weight the losses of prompts; set "
            "prompt_loss_weight to 0 or 1, or the objective to causal",
        )
    fixed_length_objectives = {spec.name for spec in config.objective.components} - set(ANY_LENGTH_OBJECTIVES)
    if data.windows != "stream" and fixed_length_objectives:
        yield Violation(
            ("data.windows", "objective.name"),
            f"{data.windows} yields texts of any length, which {' and '.join(sorted(fixed_length_objectives))} does "
            "not support; set "
            f"windows to stream, or the objective to {' or '.join(ANY_LENGTH_OBJECTIVES)}",
        )


def _check_sources(data: UnresolvedDataConfig) -> Iterator[Violation]:
    names = [source.name for source in data.sources]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Violation((f"data.sources.{index}.name",), f"'{name}' is already the name of an earlier source")
    weights = {source.name: source.weight or 0.0 for source in data.sources}
    if any(weights.values()) and not all(weights.values()):
        unweighted = ", ".join(name for name, weight in weights.items() if not weight)
        yield Violation(
            ("data.sources",),
            f"set the weight of all sources, or of none to use epochs; without a weight: {unweighted}",
        )
    elif data.sources:
        yield from _check_shares("data.sources", weights)


def _check_stages(data: UnresolvedDataConfig) -> Iterator[Violation]:
    if data.stages and not data.sources:
        yield Violation(("data.stages", "data.sources"), "stages are weights of sources, but there is one corpus")
        return
    names = {source.name for source in data.sources}
    for index, stage in enumerate(data.stages):
        key = f"data.stages.{index}.weights"
        if unknown := sorted(stage.weights.keys() - names):
            yield Violation((key,), f"no source is named {', '.join(unknown)}; there are {', '.join(sorted(names))}")
        if missing := sorted(names - stage.weights.keys()):
            yield Violation((key,), f"must also have a weight for {', '.join(missing)}; 0 for none of its samples")
        if not any(stage.weights.values()):
            yield Violation((key,), "at least one source must have a weight above 0")
        yield from _check_shares(key, stage.weights)
    if any(after.from_tokens <= before.from_tokens for before, after in pairwise(data.stages)):
        yield Violation(("data.stages",), "from_tokens must ascend")


def _check_shares(key: str, weights: Mapping[str, float]) -> Iterator[Violation]:
    yield from (Violation((key,), message) for message in find_starved_sources(weights))


def find_starved_sources(weights: Mapping[str, float]) -> Iterator[str]:
    """Yield a message for each source with a weight above 0 that gets less than one of SHARE_BLOCK_SAMPLES samples."""
    total_weight = sum(weights.values())
    for name, weight in weights.items():
        if 0 < weight * SHARE_BLOCK_SAMPLES < total_weight:
            yield (
                f"{name} has {weight / total_weight:.1e} of the samples; the smallest share is 1/{SHARE_BLOCK_SAMPLES}"
            )
