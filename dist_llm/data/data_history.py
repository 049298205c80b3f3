"""The data history of a run: which data each range of sample numbers came from. Every checkpoint has it as data.json.

The samples of a run are numbered in the order of training. A sample number always means the same window: consumed
samples are never renumbered. If the data changes at a resume, a new segment of the history begins there. The segments
before it stay unchanged.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from dist_llm.config.data_sections import SourceConfig
from dist_llm.config.objective_sections import MixtureConfig, ObjectiveSpec
from dist_llm.config.schema import Config
from dist_llm.config.section import parse_union
from dist_llm.config.sequence_lengths import count_sample_tokens
from dist_llm.data.order import Mixture
from dist_llm.data.plan import MixtureStage, SamplePlan, build_stages
from dist_llm.data.streams import DataSource, compute_quotas, compute_weights, open_sources
from dist_llm.errors import DataError

HISTORY_FILE = "data.json"
# Field of DataSpec -> config key. A resumed run may change these keys only with data.on_change: new_segment.
CONFIG_KEY_OF_FIELD = {
    "seed": "run.seed",
    "order": "data.order",
    "windows": "data.windows",
    "seq_len": "data.seq_len",
    "objective": "objective",
    "tokenizer": "tokenizer",
}


class Record(BaseModel):
    """A part of data.json. The keys of the file are the field names, or their aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class SourceRecord(Record):
    """A corpus of a data spec. The run had consumed `num_consumed` of its samples when the data spec began."""

    name: str
    path: str
    content: str  # hash of the tokens
    num_consumed: int = Field(default=0, alias="taken")


class StageRecord(Record):
    """The mixture of the sources after `from_tokens` tokens of the run."""

    from_tokens: int
    quotas: tuple[int, ...]  # samples of each source in a block of the mixture, in the order of the sources


class DataSpec(Record):
    """Everything that maps sample numbers to windows, from sample `first_sample` on."""

    first_sample: int = Field(alias="first")
    tokens: int  # tokens that the run had consumed before sample `first_sample`
    sample_tokens: int  # tokens per sample
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
    def _drop_unused_keys(cls, components: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """Drop the keys of other objectives, which version 0.1.0 saved too."""
        return tuple(parse_union(ObjectiveSpec, fields).model_dump() for fields in components)

    def to_stages(self) -> list[MixtureStage]:
        """Return the mixture stages. A stage begins at the first sample after its `from_tokens` tokens."""
        first_samples = [
            self.first_sample + max(0, -(-(stage.from_tokens - self.tokens) // self.sample_tokens))
            for stage in self.stages
        ]
        mixtures = [
            Mixture(self.seed ^ first_sample, stage.quotas)
            for first_sample, stage in zip(first_samples, self.stages, strict=True)
        ]
        return build_stages(first_samples, mixtures, [source.num_consumed for source in self.sources])


class Segment(Record):
    """The data of a range of steps, which begins after step `step`."""

    step: int
    first_sample: int = Field(alias="first")  # sample number at which the segment begins
    global_batch: int  # samples per step
    skip: tuple[tuple[int, int], ...]  # ranges [start, end) of sample numbers that are left out
    spec: DataSpec = Field(alias="mix")

    def build_plan(self, sources: Sequence[DataSource]) -> SamplePlan:
        """Return the sample plan of this segment for these open sources."""
        return SamplePlan(sources, self.spec.to_stages(), self.skip)


DataHistory = tuple[Segment, ...]


def segment_from_config(config: Config, sources: Sequence[DataSource]) -> Segment:
    """Return the first segment of a new run. Raises DataError if the weight of a source is too small."""
    data = config.data
    stages = [StageRecord(from_tokens=0, quotas=compute_quotas(compute_weights(data, sources)))]
    for stage in data.stages:
        weights = [stage.weights[source.name] for source in sources]
        stages.append(StageRecord(from_tokens=stage.from_tokens, quotas=compute_quotas(weights)))
    spec = DataSpec(
        first_sample=0,
        tokens=0,
        sample_tokens=count_sample_tokens(config),
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
                content=source.corpus.manifest.compute_fingerprint(),
            )
            for source in sources
        ),
        stages=tuple(stages),
    )
    return Segment(step=0, first_sample=0, global_batch=data.global_batch, skip=data.skip, spec=spec)


def build_fresh_plan(config: Config) -> SamplePlan:
    """Return the sample plan of a new run. Raises DataError as `open_sources` and `segment_from_config` do."""
    sources = open_sources(config)
    return segment_from_config(config, sources).build_plan(sources)


class OpenSegment(NamedTuple):
    """A segment of a data history with open corpora."""

    config: Config  # config of the run, with the data keys of this segment
    plan: SamplePlan


def open_segment(config: Config, segment: Segment) -> OpenSegment:
    """Open the corpora of a segment. `config` is the config of the run.

    Raises DataError as `open_sources` does.
    """
    spec = segment.spec
    paths: dict[str, Any] = {"path": spec.sources[0].path, "sources": ()}
    if spec.sources[0].name:
        sources = tuple(SourceConfig(name=source.name, path=source.path) for source in spec.sources)
        paths = {"path": "", "sources": sources}
    settings = {
        "order": spec.order,
        "windows": spec.windows,
        "seq_len": spec.seq_len,
        "global_batch": segment.global_batch,
    }
    components = tuple(parse_union(ObjectiveSpec, fields) for fields in spec.objective)
    segment_config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"seed": spec.seed}),
            "data": config.data.model_copy(update={**paths, **settings}),
            "objective": MixtureConfig(mixture=components),
        }
    )
    return OpenSegment(segment_config, segment.build_plan(open_sources(segment_config)))


def extend_history(
    history: DataHistory, config_segment: Segment, *, step: int, samples: int, tokens: int, new_segment: bool
) -> DataHistory:
    """Return the history of a run that resumes after `step` with the data of `config_segment`.

    `samples` and `tokens` are the numbers of samples and tokens that the run has consumed. Weights, batch size and
    skipped ranges may change. Raises DataError if other keys or corpora changed, unless `new_segment` is set.
    """
    last = history[-1]
    changes = list(_iter_changes(last.spec, config_segment.spec))
    if changes and not new_segment:
        change_lines = "".join(f"\n  {name}: {before} -> {after}" for name, before, after in changes)
        raise DataError(
            f"the run's data differs from the data it read until step {step}:{change_lines}\n"
            "Restore it; or set data.on_change: new_segment, to continue with the new data from here"
        )
    if changes or config_segment.spec.stages != last.spec.stages:
        sources = _carry_num_consumed(last, config_segment, samples)
        spec = config_segment.spec.model_copy(update={"first_sample": samples, "tokens": tokens, "sources": sources})
    else:
        paths = {source.name: source.path for source in config_segment.spec.sources}
        relocated = tuple(source.model_copy(update={"path": paths[source.name]}) for source in last.spec.sources)
        spec = last.spec.model_copy(update={"sources": relocated})
    segment = config_segment.model_copy(update={"step": step, "first_sample": samples, "spec": spec})
    unchanged = segment.model_copy(update={"step": last.step, "first_sample": last.first_sample})
    is_same_spec = spec.first_sample == last.spec.first_sample
    if is_same_spec and (unchanged.global_batch, unchanged.skip) == (last.global_batch, last.skip):
        return (*history[:-1], unchanged)
    return (*(earlier for earlier in history if earlier.step < step), segment)


def dump_history(history: DataHistory) -> bytes:
    """Return the content of data.json."""
    return json.dumps([segment.model_dump(by_alias=True) for segment in history], indent=2).encode() + b"\n"


def parse_history(content: bytes, origin: str) -> DataHistory:
    """Parse the content of data.json. Raises DataError, which names `origin`, if it is invalid."""
    try:
        return TypeAdapter(DataHistory).validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise DataError(f"{origin}: {field}: {problem['msg']}; restore the file") from None


def _iter_changes(before: DataSpec, after: DataSpec) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value before, value after) of each change that requires data.on_change: new_segment."""
    for field, key in CONFIG_KEY_OF_FIELD.items():
        if getattr(before, field) != getattr(after, field):
            yield key, getattr(before, field), getattr(after, field)
    old_sources, new_sources = ({source.name: source for source in spec.sources} for spec in (before, after))
    for name in sorted(old_sources.keys() | new_sources.keys()):
        old, new = old_sources.get(name), new_sources.get(name)
        if old is None or new is None or old.content != new.content:
            yield f"source {name}" if name else "corpus", _describe_source(old), _describe_source(new)


def _describe_source(source: SourceRecord | None) -> str:
    return f"{source.path} (content {source.content[:12]})" if source else "none"


def _carry_num_consumed(last: Segment, config_segment: Segment, samples: int) -> tuple[SourceRecord, ...]:
    """Return the sources of a new segment, which begins after `samples` samples.

    An unchanged source continues after its consumed samples. A new or changed source begins at its first sample.
    """
    stage = [stage for stage in last.spec.to_stages() if stage.first_sample <= samples][-1]
    num_consumed = {}
    if all(getattr(last.spec, field) == getattr(config_segment.spec, field) for field in CONFIG_KEY_OF_FIELD):
        counts = stage.count_consumed(samples)
        num_consumed = {(old.name, old.content): count for old, count in zip(last.spec.sources, counts, strict=True)}
    return tuple(
        source.model_copy(update={"num_consumed": num_consumed.get((source.name, source.content), 0)})
        for source in config_segment.spec.sources
    )
