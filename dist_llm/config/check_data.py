"""Check rules that relate several keys of the `data` section."""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from dist_llm.config.data_sections import SourceConfig, UnresolvedDataConfig
from dist_llm.config.load import Violation
from dist_llm.config.schema import UnresolvedConfig

BLOCK = 10_000  # number of samples in which each source has exactly its share
WINDOWED = ("causal", "masked")  # objectives that accept text of any length


def list_sources(data: UnresolvedDataConfig) -> tuple[SourceConfig, ...]:
    """Return the corpora of a run; the one in `data.path` has no name."""
    return data.sources or (SourceConfig.model_construct(name="", path=data.path, weight=1.0, epochs=1.0),)


def check_data(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield all violations of the data section."""
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
            f"{data.windows} yields texts of any length, which {' and '.join(sorted(wrong))} does not support; set "
            f"windows to stream, or the objective to {' or '.join(WINDOWED)}",
        )


def _check_sources(data: UnresolvedDataConfig) -> Iterator[Violation]:
    names = [source.name for source in data.sources]
    for number, name in enumerate(names):
        if name in names[:number]:
            yield Violation((f"data.sources.{number}.name",), f"'{name}' is already the name of an earlier source")
    weights = {source.name: source.weight or 0.0 for source in data.sources}
    if any(weights.values()) and not all(weights.values()):
        without = ", ".join(name for name, weight in weights.items() if not weight)
        yield Violation(
            ("data.sources",), f"set the weight of all sources, or of none to use epochs; without a weight: {without}"
        )
    elif data.sources:
        yield from _check_shares("data.sources", weights)


def _check_stages(data: UnresolvedDataConfig) -> Iterator[Violation]:
    if data.stages and not data.sources:
        yield Violation(("data.stages", "data.sources"), "stages are weights of sources, but there is one corpus")
        return
    names = {source.name for source in data.sources}
    for number, stage in enumerate(data.stages):
        where = f"data.stages.{number}.weights"
        if unknown := sorted(stage.weights.keys() - names):
            yield Violation((where,), f"no source is named {', '.join(unknown)}; there are {', '.join(sorted(names))}")
        if missing := sorted(names - stage.weights.keys()):
            yield Violation((where,), f"must also have a weight for {', '.join(missing)}; 0 for none of its samples")
        if not any(stage.weights.values()):
            yield Violation((where,), "at least one source must have a weight above 0")
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
            yield f"{name} has {weight / total:.1e} of the samples; the smallest share is 1/{BLOCK}"
