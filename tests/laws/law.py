"""The law: a layout computes the same steps as one process.

`record_trace` runs steps on random batches and records the loss, the number of scored tokens, each parameter's full
gradient before clipping, the gradient norm, and each parameter after the step. `assert_traces_match` compares two
traces.

An fp32 run is compared in fp64 (`comparison_dtype`): rounding is then about 1e-15 and cannot hide a fault.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.flat_shard import local_chunks
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.check import check as broken_rules
from dist_llm.config.derive import resolve
from dist_llm.config.schema import Config, ParallelConfig
from dist_llm.engines.base import Engine
from dist_llm.engines.native import NativeEngine
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.examples import TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.training.step import train_step
from tests.laws import bugs
from tests.laws.layouts import MODELS, OBJECTIVES, Layout
from tests.laws.worlds import restart_world, world

# d_ff and the number of heads are multiples of 4; grouped-query attention; the vocabulary size is not a multiple of 4,
# so two of its 132 rows are padding.
MODEL: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "d_ff": 48,
    "vocab_size": 130,
    "vocab_multiple": 4,
}
ROWS, SEQ_LEN = 24, 32
TEXT_IDS = 97  # of the 130; the remaining ids are an objective's special tokens


# A rank's shards of tensors, by name: (offset in the full tensor, shard).
ShardsByName = dict[str, list[tuple[tuple[int, ...], Tensor]]]


@dataclass
class RankTrace:
    """One rank's record of its steps.

    Per step: loss, scored tokens, gradient norm, and the rank's shards of gradients and parameters.
    """

    losses: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[ShardsByName] = field(default_factory=list)
    parameters: list[ShardsByName] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the full parameters

    def record(self, engine: "RecordingEngine") -> None:
        """Record the gradients and the parameters after a step."""
        self.gradients.append(engine.last_gradients)
        self.parameters.append(copy_local_shards(engine.named_parameters()))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in engine.named_parameters()}


@dataclass
class Trace:
    """Per step: loss, scored tokens, gradient norm, {name: full gradient}, {name: full parameter}."""

    losses: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)


def make_raw_config(model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Return a config as a user writes it. Keys of `sections` are sections or scalars of the schema."""
    architecture = model.get("architecture", "decoder")
    raw: dict[str, Any] = {
        "objective": OBJECTIVES[architecture],
        "run": {"dir": "unused", "steps": 20, "seed": 3},
        "model": MODEL | model,
        "data": {"path": "unused", "seq_len": SEQ_LEN, "global_batch": ROWS, "micro_batch": 0},
        "optim": {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.0},
    }
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    if "mixture" in raw["objective"]:
        raw["objective"] = {"mixture": raw["objective"]["mixture"]}
    return raw


def make_config(ranks: int, model: dict[str, Any], **sections: Any) -> Config:
    """Return a resolved config; arguments as in `make_raw_config`."""
    config = Config.model_validate(make_raw_config(model, **sections))
    assert not (broken := broken_rules(config, ranks, 0)), broken
    return resolve(config, ranks, 0)


def make_random_rows(seed: int, vocab_size: int = 130) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [ROWS, SEQ_LEN].

    Rows differ much in their number of targets, so a mean of means is far off.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (ROWS, SEQ_LEN + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    keep = torch.rand(ROWS, 1, generator=generator, dtype=torch.float32) ** 2  # the same numbers for fp32 and fp64
    targets[torch.rand(ROWS, SEQ_LEN, generator=generator, dtype=torch.float32) > keep] = IGNORE_INDEX
    targets[0, : SEQ_LEN // 2] = IGNORE_INDEX  # a context-parallel rank without a target
    return inputs, targets


def make_batches(config: Config, engine: Engine, step: int) -> list[Batch]:
    """Return this data rank's microbatches of the step, as the loader would cut them."""
    rank, ranks = engine.dp_rank_and_size
    share, micro_batch = ROWS // ranks, config.data.micro_batch
    if not is_causal_only(config):
        return [
            build_samples(config, step, range(i, i + micro_batch))
            for i in range(rank * share, (rank + 1) * share, micro_batch)
        ]
    inputs, targets = make_random_rows(step)
    return [
        Batch.build(inputs[i : i + micro_batch], targets[i : i + micro_batch], CAUSAL)
        for i in range(rank * share, (rank + 1) * share, micro_batch)
    ]


def is_causal_only(config: Config) -> bool:
    """Whether the config trains on next tokens only.

    Rows of such a config differ more in their number of targets than rows of text do.
    """
    model = config.model
    causal = model.architecture == "decoder" and all(each.name == "causal" for each in config.objective.components)
    return causal and not config.data.document_mask and not model.stochastic_depth


def build_samples(config: Config, step: int, rows: range) -> Batch:
    """Build these samples of the step with the config's objective, from random text with short documents."""
    objective = build_objective(config, ObjectiveVocabulary(TEXT_IDS, TEXT_IDS - 1))
    samples = np.arange(step * ROWS + rows.start, step * ROWS + rows.stop)
    component_ids = (samples % len(objective.components)).tolist()
    windows = []
    for sample, component in zip(samples.tolist(), component_ids, strict=True):
        rng = np.random.default_rng(sample)
        window = rng.integers(0, TEXT_IDS - 1, objective.components[component][1].window)
        windows.append(np.where(rng.random(len(window)) < 0.1, TEXT_IDS - 1, window))
    if objective.is_causal_only:
        return objective(windows, samples, component_ids)
    windows_with_ids = [TokenWindow(window, document_ids_W=document_ids(window, TEXT_IDS - 1)) for window in windows]
    return objective(windows_with_ids, samples, component_ids)


def document_ids(window: np.ndarray, eot: int) -> np.ndarray:
    """Return the document index of each token, from 0; `eot` is the last token of a document."""
    ends = (window == eot).astype(np.int64)
    return np.cumsum(ends) - ends


class RecordingEngine(NativeEngine):
    """A native engine that records the gradients passed to the optimizer."""

    last_gradients: ShardsByName

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        self.last_gradients = copy_local_shards(
            (name, p.grad) for name, p in self.named_parameters() if p.grad is not None
        )
        return super().update(lr, should_apply)


def copy_local_shards(tensors: Iterable[tuple[str, Any]]) -> ShardsByName:
    """Copy this rank's shards of the tensors."""
    return {
        name: [(offset, shard.detach().clone()) for offset, shard in local_chunks(value)] for name, value in tensors
    }


def copy_full_tensor(tensor: Tensor) -> Tensor:
    """Return a copy of the full tensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def record_trace(config: Config, steps: int, bug: str | None = None, decay: float = 1.0) -> RankTrace:
    """Run `steps` steps, in one process or on this rank of a world; `bug` names a planted bug."""
    with ExitStack() as planted:
        planted.enter_context(default_dtype(comparison_dtype(config)))
        if bug:
            planted.enter_context(bugs.plant_bug(bug))
        return _record_trace(config, steps, decay)


def comparison_dtype(config: Config) -> torch.dtype:
    """Return the dtype for the comparison: fp64, unless the run tests another precision than fp32."""
    return torch.float64 if config.precision == "fp32" else torch.float32


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new tensors in this dtype inside the context."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _record_trace(config: Config, steps: int, decay: float = 1.0) -> RankTrace:
    engine, rank_trace = RecordingEngine(config, torch.device("cpu")), RankTrace()
    for step in range(steps):
        report = train_step(engine, make_batches(config, engine, step), config.optim.lr * decay**step, step)
        rank_trace.losses.append(report.loss.item())
        rank_trace.scored.append(int(report.scored))
        rank_trace.norms.append(report.grad_norm.item())
        if step in (0, steps - 1):
            rank_trace.record(engine)
    return rank_trace


def reference(config: Config, steps: int, decay: float = 1.0) -> Trace:
    """Run one process on the full batch as one microbatch: no parallelism, no accumulation, no recomputation.

    The learning rate of each step is `decay` times the previous one.
    """
    data = config.data.model_copy(update={"micro_batch": ROWS})
    one_process = config.model_copy(update={"data": data, "parallel": ParallelConfig(dp_shard=1), "compile": False})
    return _reference(one_process.model_dump_json(), steps, decay)


@lru_cache(maxsize=64)
def _reference(config: str, steps: int, decay: float) -> Trace:
    return merge_ranks([record_trace(Config.model_validate_json(config), steps, decay=decay)])


def merge_ranks(by_rank: Sequence[RankTrace]) -> Trace:
    """Merge the ranks' traces. Values that several ranks report must be equal bit for bit."""
    first = by_rank[0]
    for rank, rank_trace in enumerate(by_rank[1:], 1):
        for name in ("losses", "scored", "norms"):
            assert getattr(rank_trace, name) == getattr(first, name), f"{name} of rank {rank} differ from rank 0's"
    shapes = {name: shape for rank_trace in by_rank for name, shape in rank_trace.shapes.items()}
    gradients = [
        merge_shards(shards, shapes) for shards in zip(*(rank_trace.gradients for rank_trace in by_rank), strict=True)
    ]
    parameters = [
        merge_shards(shards, shapes) for shards in zip(*(rank_trace.parameters for rank_trace in by_rank), strict=True)
    ]
    return Trace(first.losses, first.scored, first.norms, gradients, parameters)


def merge_shards(by_rank: Sequence[ShardsByName], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Assemble full tensors from the ranks' shards. Overlapping shards must be equal and no element may be missing."""
    full_tensors = {}
    for name in (name for name in shapes if any(name in shards for shards in by_rank)):
        dtype = next(shard.dtype for shards in by_rank for _, shard in shards.get(name, []))
        full = torch.full(shapes[name], torch.nan, dtype=dtype)
        for rank, shards in enumerate(by_rank):
            for offset, shard in shards.get(name, []):
                region = tuple(slice(start, start + size) for start, size in zip(offset, shard.shape, strict=True))
                previous = full[region]
                same = previous.isnan().all() or torch.equal(previous, shard)
                assert same, f"{name} of rank {rank} differs from an earlier rank's"
                full[region] = shard
        assert not full.isnan().any(), f"{name}: no rank holds some of its elements"
        full_tensors[name] = full
    return full_tensors


def assert_matches_one_process(
    layout: Layout, optim: dict[str, Any], steps: int, bug: str | None = None, **sections: Any
) -> None:
    """Raise AssertionError unless the layout computes the steps that one process computes."""
    config = make_config(
        layout.ranks,
        MODELS[layout.model],
        optim=optim,
        **{
            **layout.extra,
            **sections,
            "data": {"micro_batch": layout.micro} | layout.extra.get("data", {}),
            "parallel": layout.parallel | sections.get("parallel", {}),
        },
    )
    assert_config_matches_one_process(config, layout.ranks, steps, bug)


def assert_config_matches_one_process(
    config: Config, ranks: int, steps: int, bug: str | None = None, later: float | None = None
) -> None:
    """Same as `assert_matches_one_process` for a resolved config; `later` as in `assert_traces_match`."""
    if config.compile:
        restart_world(ranks)
    assert_traces_match(
        merge_ranks(world(ranks).run(record_trace, config, steps, bug)), reference(config, steps), later=later
    )


def assert_traces_match(
    actual_trace: Trace, expected_trace: Trace, first: float | None = None, later: float | None = None
) -> None:
    """Compare relative to the largest element of each tensor: tolerance `first` at step 1, `later` at the last step.

    The defaults are 1e-11 for fp64, otherwise 1e-5 at step 1 and 1e-4 at the last step.
    """
    exact = next(iter(actual_trace.parameters[0].values())).dtype == torch.float64
    first = first or (1e-11 if exact else 1e-5)
    later = later or (1e-11 if exact else 1e-4)
    assert actual_trace.scored == expected_trace.scored, (
        f"scored tokens {actual_trace.scored}, one process {expected_trace.scored}"
    )
    for step, (actual_value, expected_value) in enumerate(zip(actual_trace.losses, expected_trace.losses, strict=True)):
        assert_close(
            f"loss of step {step + 1}",
            to_scalar(actual_value),
            to_scalar(expected_value),
            first if step == 0 else later,
        )
    for step, (actual_value, expected_value) in enumerate(zip(actual_trace.norms, expected_trace.norms, strict=True)):
        assert_close(
            f"norm of step {step + 1}",
            to_scalar(actual_value),
            to_scalar(expected_value),
            first if step == 0 else later,
        )
    for index, tolerance in ((0, first), (-1, later)):
        for kind in ("gradients", "parameters"):
            actual, expected = getattr(actual_trace, kind)[index], getattr(expected_trace, kind)[index]
            assert actual.keys() == expected.keys(), f"{kind}: {actual.keys() ^ expected.keys()}"
            # A gradient that is zero in exact arithmetic (of a key bias without RoPE) is the rounding error of its
            # summands.
            rounding = 1e-14 if exact else 1e-7
            noise = rounding * max(float(value.abs().max()) for value in expected.values())
            for name in expected:
                assert_close(f"{kind[:-1]} {name}, record {index}", actual[name], expected[name], tolerance, noise)


def to_scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def assert_close(label: str, actual: Tensor, expected: Tensor, tolerance: float, noise: float = 0.0) -> None:
    largest = float(expected.abs().max())
    off = float((actual - expected).abs().max())
    assert off <= tolerance * largest + noise, (
        f"{label}: off by {off:.2e} where the largest element is {largest:.2e}, allowed {tolerance:.0e} of it"
    )


def save_checkpoint(store: CheckpointStore, engine: Engine, progress: Progress, files: dict[str, bytes]) -> Path:
    """Save a checkpoint, wait until it is on disk, and return its path."""
    store.save(engine.state, progress, files)
    store.finish()
    path = (store.directory / f"step_{progress.step:08d}").local
    assert path is not None
    return path
