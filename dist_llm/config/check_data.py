"""Rules of the `data` section that join several of its keys."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from dist_llm.config.load import Violation
from dist_llm.config.schema import Config, DataConfig, SourceConfig

BLOCK = 10_000  # samples in which every source has its exact share
WINDOWED = ("causal", "masked")  # objectives that take text of any length


def sources_of(data: DataConfig) -> tuple[SourceConfig, ...]:
    """Return the corpora of a run; the one in `data.path` has no name."""
    return data.sources or (SourceConfig.model_construct(name="", path=data.path, weight=1.0, epochs=1.0),)


def check_data(config: Config) -> Iterator[Violation]:
    """Yield all broken rules."""
    data = config.data
    if bool(data.path) == bool(data.sources):
        problem = "neither is set" if not data.path else "both are set"
        yield Violation(("data.path", "data.sources"), f"name one corpus in path, or several in sources; {problem}")
    yield from _check_sources(data)
    yield from _check_stages(data)
    for number, (first, end) in enumerate(data.skip):
        if end <= first:
            yield Violation((f"data.skip.{number}",), f"[{first}, {end}) is empty; write [from, to] with from < to")
    if any(after[0] < before[1] for before, after in pairwise(data.skip)):
        yield Violation(("data.skip",), "ranges must ascend and not overlap")
    wrong = {each.name for each in config.objective.components} - set(WINDOWED)
    if data.windows != "stream" and wrong:
        yield Violation(
            ("data.windows", "objective.name"),
            f"{data.windows} gives texts of any length, which {' and '.join(sorted(wrong))} cannot take; set windows "
            f"to stream, or the objective to {' or '.join(WINDOWED)}",
        )


def _check_sources(data: DataConfig) -> Iterator[Violation]:
    names = [source.name for source in data.sources]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield Violation((f"data.sources.{number}.name",), f"'{name}' is the name of an earlier source, too")
    weights = {source.name: source.weight for source in data.sources}
    if any(weights.values()) and not all(weights.values()):
        without = ", ".join(name for name, weight in weights.items() if not weight)
        yield Violation(
            ("data.sources",), f"give all sources a weight or none of them (then epochs hold); without one: {without}"
        )
    elif data.sources:
        yield from _check_shares("data.sources", weights)


def _check_stages(data: DataConfig) -> Iterator[Violation]:
    if data.stages and not data.sources:
        yield Violation(("data.stages", "data.sources"), "stages weigh sources, but there is one corpus alone")
        return
    names = {source.name for source in data.sources}
    for number, stage in enumerate(data.stages):
        where = f"data.stages.{number}.weights"
        if unknown := sorted(stage.weights.keys() - names):
            yield Violation((where,), f"no source is called {', '.join(unknown)}; there are {', '.join(sorted(names))}")
        if missing := sorted(names - stage.weights.keys()):
            yield Violation((where,), f"must say the weight of {', '.join(missing)}, too; 0: none of it")
        if not any(stage.weights.values()):
            yield Violation((where,), "some source must have a weight above 0")
        yield from _check_shares(where, stage.weights)
    if any(after.from_tokens <= before.from_tokens for before, after in pairwise(data.stages)):
        yield Violation(("data.stages",), "from_tokens must ascend")


def _check_shares(where: str, weights: Mapping[str, float]) -> Iterator[Violation]:
    yield from (Violation((where,), message) for message in starved(weights))


def starved(weights: Mapping[str, float]) -> Iterator[str]:
    """Yield a line for each source whose weight is above 0 but yields less than one sample per BLOCK."""
    total = sum(weights.values())
    for name, weight in weights.items():
        if 0 < weight * BLOCK < total:
            yield f"{name} has {weight / total:.1e} of the samples; the least share is 1/{BLOCK}"
