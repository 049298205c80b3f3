"""The law: a layout computes the step that one process computes.

`trace` takes steps on random batches and keeps all that a step is: loss, scored tokens, every
parameter's full gradient before clipping, the norm, and every parameter after. `compare` holds one
trace against another.

A run in fp32 is judged in fp64 (`exact_dtype`): rounding is then 1e-15, and no fault can hide under it.
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
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.examples import TokenWindow
from dist_llm.objectives.objective_vocabulary import Vocabulary
from dist_llm.train.step import train_step
from tests.laws import bugs
from tests.laws.layouts import MODELS, OBJECTIVES, Layout
from tests.laws.worlds import restart_world, world

# d_ff and heads divide by 4; GQA; the vocabulary divides by nothing, so two of its 132 rows are padding.
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
TEXT_IDS = 97  # of the 130; an objective's own ids come after them


# What a rank has of tensors: (offset in the whole, part) by name.
Placed = dict[str, list[tuple[tuple[int, ...], Tensor]]]


@dataclass
class RankTrace:
    """What one rank saw of its steps. Per step: loss, scored, norm, its parts of gradients and of parameters."""

    losses: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Placed] = field(default_factory=list)
    parameters: list[Placed] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of whole parameters

    def keep(self, engine: "Spy") -> None:
        """Its gradients and parameters after a step."""
        self.gradients.append(engine.kept)
        self.parameters.append(parts_of(engine.named_parameters()))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in engine.named_parameters()}


@dataclass
class Trace:
    """Per step: loss, scored, norm, {name: gradient}, {name: parameter}."""

    losses: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)


def raw_config(model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A config as a user writes it; keys of `sections` are sections or scalars of the schema."""
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


def config_of(ranks: int, model: dict[str, Any], **sections: Any) -> Config:
    """A resolved config; arguments as of `raw_config`."""
    config = Config.model_validate(raw_config(model, **sections))
    assert not (broken := broken_rules(config, ranks, 0)), broken
    return resolve(config, ranks, 0)


def random_rows(seed: int, vocab_size: int = 130) -> tuple[Tensor, Tensor]:
    """Inputs and targets [ROWS, SEQ_LEN] of very uneven weight: a mean of means is far off."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (ROWS, SEQ_LEN + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    keep = torch.rand(ROWS, 1, generator=generator, dtype=torch.float32) ** 2  # the same numbers, judged in fp64 or not
    targets[torch.rand(ROWS, SEQ_LEN, generator=generator, dtype=torch.float32) > keep] = IGNORE
    targets[0, : SEQ_LEN // 2] = IGNORE  # a whole context-parallel part without a target
    return inputs, targets


def batches_of(config: Config, engine: Engine, step: int) -> list[Batch]:
    """This data rank's microbatches of the step, as the loader would cut them."""
    rank, ranks = engine.dp_rank_and_size
    share, micro = ROWS // ranks, config.data.micro_batch
    if not plain(config):
        return [made_of(config, step, range(i, i + micro)) for i in range(rank * share, (rank + 1) * share, micro)]
    inputs, targets = random_rows(step)
    return [
        Batch.of(inputs[i : i + micro], targets[i : i + micro], CAUSAL)
        for i in range(rank * share, (rank + 1) * share, micro)
    ]


def plain(config: Config) -> bool:
    """Whether next tokens are all there is to learn: then rows are more uneven than any text."""
    model = config.model
    causal = model.architecture == "decoder" and all(each.name == "causal" for each in config.objective.components)
    return causal and not config.data.document_mask and not model.stochastic_depth


def made_of(config: Config, step: int, rows: range) -> Batch:
    """These samples of the step, made by the config's objective of random text with short documents."""
    objective = build_objective(config, Vocabulary(TEXT_IDS, TEXT_IDS - 1))
    samples = np.arange(step * ROWS + rows.start, step * ROWS + rows.stop)
    members = (samples % len(objective.components)).tolist()
    windows = []
    for sample, member in zip(samples.tolist(), members, strict=True):
        rng = np.random.default_rng(sample)
        window = rng.integers(0, TEXT_IDS - 1, objective.components[member][1].window)
        windows.append(np.where(rng.random(len(window)) < 0.1, TEXT_IDS - 1, window))
    if objective.is_plain_causal:
        return objective(windows, samples, members)
    texts = [TokenWindow(window, document_ids_W=ended_documents(window, TEXT_IDS - 1)) for window in windows]
    return objective(texts, samples, members)


def ended_documents(window: np.ndarray, eot: int) -> np.ndarray:
    """The number of each token's document, from 0, where `eot` ends one."""
    ends = (window == eot).astype(np.int64)
    return np.cumsum(ends) - ends


class Spy(NativeEngine):
    """An engine that keeps the gradients it is about to use."""

    kept: Placed

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        self.kept = parts_of((name, p.grad) for name, p in self.named_parameters() if p.grad is not None)
        return super().update(lr, should_apply)


def parts_of(tensors: Iterable[tuple[str, Any]]) -> Placed:
    return {name: [(offset, part.detach().clone()) for offset, part in local_chunks(held)] for name, held in tensors}


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, copied."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def trace(config: Config, steps: int, bug: str | None = None, decay: float = 1.0) -> RankTrace:
    """Take `steps` steps, on one process or on this rank of a world, with a bug planted if one is named."""
    with ExitStack() as planted:
        planted.enter_context(default_dtype(exact_dtype(config)))
        if bug:
            planted.enter_context(bugs.plant_bug(bug))
        return _trace(config, steps, decay)


def exact_dtype(config: Config) -> torch.dtype:
    """The dtype in which a run is judged: fp64, unless another precision than fp32 is its subject."""
    return torch.float64 if config.precision == "fp32" else torch.float32


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _trace(config: Config, steps: int, decay: float = 1.0) -> RankTrace:
    engine, found = Spy(config, torch.device("cpu")), RankTrace()
    for step in range(steps):
        report = train_step(engine, batches_of(config, engine, step), config.optim.lr * decay**step, step)
        found.losses.append(report.loss.item())
        found.scored.append(int(report.scored))
        found.norms.append(report.grad_norm.item())
        if step in (0, steps - 1):
            found.keep(engine)
    return found


def reference(config: Config, steps: int, decay: float = 1.0) -> Trace:
    """One process on the whole batch in one piece: no layout, no accumulation, no recomputation.

    Each step's rate is `decay` times that of the one before.
    """
    data = config.data.model_copy(update={"micro_batch": ROWS})
    plain = config.model_copy(update={"data": data, "parallel": ParallelConfig(dp_shard=1), "compile": False})
    return _reference(plain.model_dump_json(), steps, decay)


@lru_cache(maxsize=64)
def _reference(config: str, steps: int, decay: float) -> Trace:
    return merge_ranks([trace(Config.model_validate_json(config), steps, decay=decay)])


def merge_ranks(every: Sequence[RankTrace]) -> Trace:
    """All ranks' steps as one. What several ranks report must be the same, bit for bit."""
    first = every[0]
    for rank, other in enumerate(every[1:], 1):
        for name in ("losses", "scored", "norms"):
            assert getattr(other, name) == getattr(first, name), f"{name} of rank {rank} differ from rank 0's"
    shapes = {name: shape for taken in every for name, shape in taken.shapes.items()}
    gradients = [joined(parts, shapes) for parts in zip(*(taken.gradients for taken in every), strict=True)]
    parameters = [joined(parts, shapes) for parts in zip(*(taken.parameters for taken in every), strict=True)]
    return Trace(first.losses, first.scored, first.norms, gradients, parameters)


def joined(every: Sequence[Placed], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Those of the tensors that any rank has; what several have must be the same, and nothing may be missing."""
    found = {}
    for name in (name for name in shapes if any(name in parts for parts in every)):
        dtype = next(part.dtype for parts in every for _, part in parts.get(name, []))
        whole = torch.full(shapes[name], torch.nan, dtype=dtype)
        for rank, parts in enumerate(every):
            for offset, part in parts.get(name, []):
                place = tuple(slice(at, at + size) for at, size in zip(offset, part.shape, strict=True))
                before = whole[place]
                same = before.isnan().all() or torch.equal(before, part)
                assert same, f"{name} of rank {rank} differs from an earlier rank's"
                whole[place] = part
        assert not whole.isnan().any(), f"{name}: no rank holds all of it"
        found[name] = whole
    return found


def assert_matches_one_process(
    layout: Layout, optim: dict[str, Any], steps: int, bug: str | None = None, **sections: Any
) -> None:
    """Raise AssertionError unless the layout computes the steps that one process computes."""
    config = config_of(
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
    hold_config(config, layout.ranks, steps, bug)


def hold_config(config: Config, ranks: int, steps: int, bug: str | None = None, later: float | None = None) -> None:
    """As `assert_matches_one_process`, of a resolved config; `later` as of `compare`."""
    if config.compile:
        restart_world(ranks)
    compare(merge_ranks(world(ranks).run(trace, config, steps, bug)), reference(config, steps), later=later)


def compare(got: Trace, want: Trace, first: float | None = None, later: float | None = None) -> None:
    """Relative to the largest element of each tensor: `first` at step 1, `later` at the last.

    By default 1e-11 of what was judged in fp64; else 1e-5 at step 1 and 1e-4 at the last.
    """
    exact = next(iter(got.parameters[0].values())).dtype == torch.float64
    first = first or (1e-11 if exact else 1e-5)
    later = later or (1e-11 if exact else 1e-4)
    assert got.scored == want.scored, f"scored tokens {got.scored}, one process {want.scored}"
    for step, (a, b) in enumerate(zip(got.losses, want.losses, strict=True)):
        close(f"loss of step {step + 1}", scalar(a), scalar(b), first if step == 0 else later)
    for step, (a, b) in enumerate(zip(got.norms, want.norms, strict=True)):
        close(f"norm of step {step + 1}", scalar(a), scalar(b), first if step == 0 else later)
    for place, tolerance in ((0, first), (-1, later)):
        for kind in ("gradients", "parameters"):
            found, wanted = getattr(got, kind)[place], getattr(want, kind)[place]
            assert found.keys() == wanted.keys(), f"{kind}: {found.keys() ^ wanted.keys()}"
            # A gradient that is zero in exact arithmetic (of a key bias without rope) is rounding of its summands.
            rounding = 1e-14 if exact else 1e-7
            noise = rounding * max(float(value.abs().max()) for value in wanted.values())
            for name in wanted:
                close(f"{kind[:-1]} {name}, record {place}", found[name], wanted[name], tolerance, noise)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def close(what: str, found: Tensor, wanted: Tensor, tolerance: float, noise: float = 0.0) -> None:
    largest = float(wanted.abs().max())
    off = float((found - wanted).abs().max())
    assert off <= tolerance * largest + noise, (
        f"{what}: off by {off:.2e} where the largest element is {largest:.2e}, allowed {tolerance:.0e} of it"
    )


def saved(store: CheckpointStore, engine: Engine, progress: Progress, files: dict[str, bytes]) -> Path:
    """A checkpoint, once it is on the disk."""
    store.save(engine.state, progress, files)
    store.finish()
    path = (store.directory / f"step_{progress.step:08d}").local
    assert path is not None
    return path
