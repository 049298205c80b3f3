"""The data history of a run: segments of sample numbers, saved in every checkpoint as data.json.

A sample number means the same window during the whole run; consumed samples are never renumbered. If the data changes
at a resume, a new segment begins there. The segments before it stay unchanged.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from dist_llm.config.data_sections import SourceConfig
from dist_llm.config.lengths import sample_tokens
from dist_llm.config.objective_sections import MixtureConfig, ObjectiveSpec
from dist_llm.config.schema import Config
from dist_llm.config.section import parse_union
from dist_llm.data.order import Mixture
from dist_llm.data.plan import MixtureStage, SamplePlan, build_stages
from dist_llm.data.streams import DataSource, compute_quotas, compute_weights, open_sources
from dist_llm.errors import DataError

HISTORY_FILE = "data.json"
CONFIG_KEYS = {  # field of DataSpec -> config key; changing it requires data.on_change: new_segment
    "seed": "run.seed",
    "order": "data.order",
    "windows": "data.windows",
    "seq_len": "data.seq_len",
    "objective": "objective",
    "tokenizer": "tokenizer",
}


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceRecord(Record):
    """A corpus. `num_consumed` samples of it were consumed before this data spec began."""

    name: str
    path: str
    content: str  # hash of the tokens
    num_consumed: int = Field(default=0, alias="taken")  # the key in data.json


class StageRecord(Record):
    """Quotas of the sources, in their order, from token `from_tokens` of the run on."""

    from_tokens: int
    quotas: tuple[int, ...]


class DataSpec(Record):
    """How sample numbers from `first` on map to windows. `tokens` were trained on before it."""

    first: int
    tokens: int
    sample_tokens: int
    seed: int
    order: str
    windows: str
    seq_len: int
    objective: tuple[dict[str, Any], ...]
    tokenizer: str
    sources: tuple[SourceRecord, ...]
    stages: tuple[StageRecord, ...]

    @field_validator("objective")
    @classmethod
    def _only_used_keys(cls, components: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """Drop keys of other objectives, which runs of version 0.1.0 saved."""
        return tuple(parse_union(ObjectiveSpec, fields).model_dump() for fields in components)

    def to_stages(self) -> list[MixtureStage]:
        """Return the stages with their first sample numbers."""
        firsts = [
            self.first + max(0, -(-(stage.from_tokens - self.tokens) // self.sample_tokens)) for stage in self.stages
        ]
        mixtures = [Mixture(self.seed ^ first, stage.quotas) for first, stage in zip(firsts, self.stages, strict=True)]
        return build_stages(firsts, mixtures, [source.num_consumed for source in self.sources])


class Segment(Record):
    """The data after step `step`: each step consumes `global_batch` samples, from sample number `first` on.

    The sample numbers in `skip` are left out.
    """

    step: int
    first: int
    global_batch: int
    skip: tuple[tuple[int, int], ...]
    mix: DataSpec

    def build_plan(self, sources: Sequence[DataSource]) -> SamplePlan:
        """Return the sample plan of this segment for these open sources."""
        return SamplePlan(sources, self.mix.to_stages(), self.skip)


DataHistory = tuple[Segment, ...]


def segment_from_config(config: Config, sources: Sequence[DataSource]) -> Segment:
    """Return the first segment of a new run. Raises DataError if a source is too small for its epochs."""
    data = config.data
    stages = [StageRecord(from_tokens=0, quotas=compute_quotas(compute_weights(data, sources)))]
    for stage in data.stages:
        weights = [stage.weights[source.name] for source in sources]
        stages.append(StageRecord(from_tokens=stage.from_tokens, quotas=compute_quotas(weights)))
    mix = DataSpec(
        first=0,
        tokens=0,
        sample_tokens=sample_tokens(config),
        seed=config.run.seed,
        order=data.order,
        windows=data.windows,
        seq_len=data.seq_len,
        objective=tuple(component.model_dump() for component in config.objective.components),
        tokenizer=sources[0].corpus.manifest.tokenizer_sha256,
        sources=tuple(
            SourceRecord(
                name=source.name,
                path=str(source.corpus.directory.resolve()),
                content=source.corpus.manifest.fingerprint(),
            )
            for source in sources
        ),
        stages=tuple(stages),
    )
    return Segment(step=0, first=0, global_batch=data.global_batch, skip=data.skip, mix=mix)


def build_fresh_plan(config: Config) -> SamplePlan:
    """Return the sample plan of a new run. Raises DataError as `open_sources` and `segment_from_config` do."""
    sources = open_sources(config)
    return segment_from_config(config, sources).build_plan(sources)


def open_segment(config: Config, segment: Segment) -> tuple[Config, SamplePlan]:
    """Return the config as it was in a past or present segment, and its plan. Raises DataError as `open_sources`
    does."""
    mix = segment.mix
    paths: dict[str, Any] = {"path": mix.sources[0].path, "sources": ()}
    if mix.sources[0].name:
        sources = tuple(SourceConfig(name=source.name, path=source.path) for source in mix.sources)
        paths = {"path": "", "sources": sources}
    settings = {
        "order": mix.order,
        "windows": mix.windows,
        "seq_len": mix.seq_len,
        "global_batch": segment.global_batch,
    }
    components = tuple(parse_union(ObjectiveSpec, fields) for fields in mix.objective)
    then = config.model_copy(
        update={
            "run": config.run.model_copy(update={"seed": mix.seed}),
            "data": config.data.model_copy(update={**paths, **settings}),
            "objective": MixtureConfig(mixture=components),
        }
    )
    return then, segment.build_plan(open_sources(then))


def extend_history(
    history: DataHistory, config_segment: Segment, step: int, samples: int, tokens: int, new_segment: bool
) -> DataHistory:
    """Return the history of a run that resumes at `step` and sample `samples` with the data of `config_segment`.

    Weights, batch size and skipped ranges may change. Raises DataError if anything else changed, unless `new_segment`
    is set.
    """
    last = history[-1]
    changes = list(_iter_changes(last.mix, config_segment.mix))
    if changes and not new_segment:
        listed = "".join(f"\n  {name}: {before} -> {after}" for name, before, after in changes)
        raise DataError(
            f"the run's data differs from the data it read until step {step}:{listed}\n"
            "Restore it; or set data.on_change: new_segment, to continue with the new data from here"
        )
    if changes or config_segment.mix.stages != last.mix.stages:
        mix = config_segment.mix.model_copy(
            update={"first": samples, "tokens": tokens, "sources": _carry_num_consumed(last, config_segment, samples)}
        )
    else:
        paths = {source.name: source.path for source in config_segment.mix.sources}
        relocated = tuple(source.model_copy(update={"path": paths[source.name]}) for source in last.mix.sources)
        mix = last.mix.model_copy(update={"sources": relocated})
    segment = config_segment.model_copy(update={"step": step, "first": samples, "mix": mix})
    unchanged = segment.model_copy(update={"step": last.step, "first": last.first})
    if mix.first == last.mix.first and (unchanged.global_batch, unchanged.skip) == (last.global_batch, last.skip):
        return (*history[:-1], unchanged)
    return (*(earlier for earlier in history if earlier.step < step), segment)


def dump_history(history: DataHistory) -> bytes:
    return json.dumps([segment.model_dump(by_alias=True) for segment in history], indent=2).encode() + b"\n"


def parse_history(content: bytes, origin: str) -> DataHistory:
    """Read the output of `dump_history`. Raises DataError, naming `origin`, if it is invalid."""
    try:
        return TypeAdapter(DataHistory).validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{origin}: {'.'.join(map(str, first['loc']))}: {first['msg']}; restore the file") from None


def _iter_changes(before: DataSpec, after: DataSpec) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, before, after) of each difference that a resume must not make silently."""
    for field, key in CONFIG_KEYS.items():
        if getattr(before, field) != getattr(after, field):
            yield key, getattr(before, field), getattr(after, field)
    old, new = ({source.name: source for source in mix.sources} for mix in (before, after))
    for name in sorted(old.keys() | new.keys()):
        then, now = old.get(name), new.get(name)
        if then is None or now is None or then.content != now.content:
            yield f"source {name}" if name else "corpus", _describe_source(then), _describe_source(now)


def _describe_source(source: SourceRecord | None) -> str:
    return f"{source.path} (content {source.content[:12]})" if source else "none"


def _carry_num_consumed(last: Segment, config_segment: Segment, samples: int) -> tuple[SourceRecord, ...]:
    """Return the new sources. An unchanged source continues after its consumed samples; a new source begins at 0."""
    stage = [stage for stage in last.mix.to_stages() if stage.first <= samples][-1]
    num_consumed = {}
    if all(getattr(last.mix, field) == getattr(config_segment.mix, field) for field in CONFIG_KEYS):
        counts = stage.count_consumed(samples)
        num_consumed = {(old.name, old.content): count for old, count in zip(last.mix.sources, counts, strict=True)}
    return tuple(
        source.model_copy(update={"num_consumed": num_consumed.get((source.name, source.content), 0)})
        for source in config_segment.mix.sources
    )
