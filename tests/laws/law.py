"""The helpers of the law tests. The law: a parallel layout computes the same training steps as one process.

To compare a layout (layouts.py) with one process:

    assert_matches_one_process(LAYOUTS["tp2_llama"], optim=CLIPPED_SGD, steps=2)

or in single steps, for example to run the ranks with other options than the reference:

    config = make_layout_config(Layout(ranks=2, parallel={"tp": 2}, model="gpt"), optim=CLIPPED_SGD)
    actual = merge_ranks(get_world(2).run(record_trace, config, steps=2))
    assert_traces_match(actual, trace_one_process(config, steps=2))

`record_trace` runs steps on random batches on one rank and records a trace: the loss, the number of valid tokens, the
gradient norm, the gradients before clipping, and the parameters after the step. `get_world` (worlds.py) calls it on all
ranks. `merge_ranks` assembles full tensors from the traces of the ranks. `assert_traces_match` compares the merged
trace with that of one process.

`record_trace` computes in fp64 if the precision of the run is fp32 (`choose_comparison_dtype`). Rounding errors are
then about 1e-15 and cannot hide a bug. Code that steps an engine itself enters `use_default_dtype` for this.
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
from dist_llm.config.check import check
from dist_llm.config.derive import resolve_config
from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.engines.base import Engine
from dist_llm.engines.native import NativeEngine
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.examples import TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.training.step import train_step
from tests.laws import bugs, moe_bugs, window_bugs  # noqa: F401  # moe_bugs and window_bugs register their bugs
from tests.laws.layouts import MODELS, OBJECTIVE_OF_ARCHITECTURE, Layout
from tests.laws.worlds import get_world, restart_world

# d_ff and the number of heads are multiples of 4, for up to 4 tensor ranks. The vocabulary size is not a multiple of 4,
# so 2 of the 132 rows of the embedding are padding.
MODEL: dict[str, Any] = {
    "d_model": 32,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "d_ff": 48,
    "vocab_size": 130,
    "vocab_multiple": 4,
}
GLOBAL_BATCH, SEQ_LEN = 24, 32  # sequences in a step, tokens in a sequence
TEXT_IDS = 97  # number of ids in random text; the ids from 97 to 129 are special tokens of an objective


# The shards of one rank, by the name of the tensor: [(offset in the full tensor, shard)].
ShardsByName = dict[str, list[tuple[tuple[int, ...], Tensor]]]


@dataclass
class RankTrace:
    """What one rank records in a run.

    Of each step: the loss, its denominator, the gradient norm, and the number of tokens of each expert by
    layer. Of the first and the last step: the shards of gradients and parameters on this rank, and the buffers, which
    are among the parameters.
    """

    losses: list[float] = field(default_factory=list)
    loss_denominators: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    expert_counts: list[dict[int, list[float]]] = field(default_factory=list)
    gradients: list[ShardsByName] = field(default_factory=list)
    parameters: list[ShardsByName] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the full parameters

    def record(self, engine: "RecordingEngine") -> None:
        """Record the gradients and the parameters after a step."""
        self.gradients.append(engine.last_gradients)
        tensors = [*engine.named_parameters(), *engine.named_buffers()]
        self.parameters.append(copy_local_shards(tensors))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors}


@dataclass
class Trace:
    """A trace of all ranks, with full tensors: {name: gradient} and {name: parameter} per recorded step."""

    losses: list[float] = field(default_factory=list)
    loss_denominators: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    expert_counts: list[dict[int, list[float]]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)


def make_raw_config(*, model: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Return a config as a user writes it, with the defaults of the law tests.

    `model` overrides keys of MODEL. `sections` overrides other sections or top-level keys of the schema, such as
    `parallel={"tp": 2}` or `precision="bf16"`.
    """
    model = MODEL | (model or {})
    architecture = model.get("architecture", "decoder")
    raw: dict[str, Any] = {
        "objective": OBJECTIVE_OF_ARCHITECTURE[architecture],
        "run": {"dir": "unused", "steps": 20, "seed": 3},
        "model": model,
        "data": {"path": "unused", "seq_len": SEQ_LEN, "global_batch": GLOBAL_BATCH, "micro_batch": 0},
        "optim": {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.0},
    }
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    if "mixture" in raw["objective"]:
        raw["objective"] = {"mixture": raw["objective"]["mixture"]}
    return raw


def make_config(*, ranks: int, model: dict[str, Any] | None = None, **sections: Any) -> Config:
    """Return a resolved config for `ranks` ranks; the other arguments are those of `make_raw_config`.

    Raises AssertionError if a config rule refuses it.
    """
    config = UnresolvedConfig.model_validate(make_raw_config(model=model, **sections))
    assert not (violations := check(config, ranks, tokenizer_size=0)), violations
    return resolve_config(config, ranks, tokenizer_size=0)


def make_layout_config(layout: Layout, *, optim: dict[str, Any], **sections: Any) -> Config:
    """Return a resolved config for the ranks, the model and the microbatch size of a layout.

    `optim` is the section of the optimizer, such as ADAMW of layouts.py. `sections` are further config sections; their
    keys take precedence over those of the layout.
    """
    overrides = {
        **layout.sections,
        **sections,
        "model": MODELS[layout.model] | sections.get("model", {}),
        "data": {"micro_batch": layout.micro_batch} | layout.sections.get("data", {}) | sections.get("data", {}),
        "parallel": layout.parallel | sections.get("parallel", {}),
    }
    return make_config(ranks=layout.ranks, optim=optim, **overrides)


def make_random_sequences(seed: int, vocab_size: int = 130) -> tuple[Tensor, Tensor]:
    """Return random inputs and targets, each of shape [GLOBAL_BATCH, SEQ_LEN].

    Some targets are IGNORE_INDEX. The sequences have very different numbers of valid targets, so that a mean of
    per-rank means differs from the mean over all valid targets.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    # The dtype is fixed, so that fp32 and fp64 runs draw the same numbers.
    target_probability = torch.rand(GLOBAL_BATCH, 1, generator=generator, dtype=torch.float32) ** 2
    draws = torch.rand(GLOBAL_BATCH, SEQ_LEN, generator=generator, dtype=torch.float32)
    targets[draws > target_probability] = IGNORE_INDEX
    targets[0, : SEQ_LEN // 2] = IGNORE_INDEX  # a context-parallel rank without a target
    return inputs, targets


def make_batches(config: Config, engine: Engine, step: int) -> list[Batch]:
    """Return the microbatches of this data-parallel rank in a step, split as the loader splits them."""
    dp_rank, dp_size = engine.dp_rank_and_size
    local_batch, micro_batch = GLOBAL_BATCH // dp_size, config.data.micro_batch
    starts = range(dp_rank * local_batch, (dp_rank + 1) * local_batch, micro_batch)
    if not uses_random_sequences(config):
        return [build_samples(config, step, range(start, start + micro_batch)) for start in starts]
    inputs, targets = make_random_sequences(step)
    batches = [
        Batch.build(inputs[start : start + micro_batch], targets[start : start + micro_batch], CAUSAL)
        for start in starts
    ]
    if config.data.prompt_loss_weight == 0:
        return batches
    weights = make_prompt_weights(step, config.data.prompt_loss_weight)
    return [
        batch.with_loss_weights(weights[start : start + micro_batch])
        for start, batch in zip(starts, batches, strict=True)
    ]


def make_prompt_weights(seed: int, prompt_loss_weight: float) -> Tensor:
    """Return loss weights [GLOBAL_BATCH, SEQ_LEN]: each sequence begins with a prompt of random length."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lens = torch.randint(SEQ_LEN + 1, (GLOBAL_BATCH, 1), generator=generator)
    return torch.where(torch.arange(SEQ_LEN) < prompt_lens, prompt_loss_weight, 1.0)


def uses_random_sequences(config: Config) -> bool:
    """Return whether the batches come from `make_random_sequences` and not from the objective of the config.

    This is the case if all components are causal and there is no document mask. In random sequences, the numbers of
    targets differ more than in the samples that an objective builds.
    """
    model, components = config.model, config.objective.components
    is_causal = model.architecture == "decoder" and all(component.name == "causal" for component in components)
    return is_causal and not config.data.document_mask and not model.stochastic_depth


def build_samples(config: Config, step: int, indices: range) -> Batch:
    """Build samples from random text with short documents, with the objective of the config.

    `indices` are the positions of the samples in the global batch of the step.
    """
    prompt_loss_weight = config.data.prompt_loss_weight
    vocabulary = ObjectiveVocabulary(TEXT_IDS, TEXT_IDS - 1)
    objective = build_objective(config, vocabulary, weights_prompts=prompt_loss_weight > 0)
    samples = np.arange(step * GLOBAL_BATCH + indices.start, step * GLOBAL_BATCH + indices.stop)
    component_ids = (samples % len(objective.components)).tolist()
    windows = []
    for sample, component in zip(samples.tolist(), component_ids, strict=True):
        rng = np.random.default_rng(sample)
        window = rng.integers(0, TEXT_IDS - 1, objective.components[component][1].window_tokens)
        windows.append(np.where(rng.random(len(window)) < 0.1, TEXT_IDS - 1, window))
    if objective.has_plain_windows:
        return objective(windows, samples, component_ids)
    token_windows = [
        TokenWindow(
            window,
            # The first third of each window is a prompt.
            loss_weights_W=np.where(np.arange(len(window)) < len(window) // 3, prompt_loss_weight, 1.0)
            if prompt_loss_weight
            else None,
            document_ids_W=compute_document_ids(window, TEXT_IDS - 1),
        )
        for window in windows
    ]
    return objective(token_windows, samples, component_ids)


def compute_document_ids(window: np.ndarray, end_token: int) -> np.ndarray:
    """Return the index of the document of each token of a window [W], counted from 0.

    Each document ends with `end_token`.
    """
    is_end = (window == end_token).astype(np.int64)
    return np.cumsum(is_end) - is_end


class RecordingEngine(NativeEngine):
    """A native engine that records the gradients passed to the optimizer."""

    last_gradients: ShardsByName

    def __init__(self, config: Config, device: torch.device) -> None:
        super().__init__(config, device)
        for name, buffer in self.named_buffers():
            if name.endswith("selection_bias"):  # a bias of 0 would hide where it must not be added
                buffer.copy_(torch.where(torch.arange(len(buffer)) % 3 == 0, 0.1, -0.1))

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        self.last_gradients = copy_local_shards(
            (name, parameter.grad) for name, parameter in self.named_parameters() if parameter.grad is not None
        )
        return super().update(lr, should_apply)


def copy_local_shards(tensors: Iterable[tuple[str, Any]]) -> ShardsByName:
    """Return copies of the shards on this rank. `tensors` are (name, tensor or DTensor) pairs."""
    return {
        name: [(offset, shard.detach().clone()) for offset, shard in local_chunks(value)] for name, value in tensors
    }


def copy_full_tensor(tensor: Tensor) -> Tensor:
    """Return a copy of the full tensor."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def record_trace(config: Config, *, steps: int, bug: str | None = None, lr_decay: float = 1.0) -> RankTrace:
    """Run `steps` steps in one process or on this rank of a world (worlds.py), and return their trace.

    `bug` is the name of a planted bug (bugs.py). Each learning rate is `lr_decay` times that of the previous step.
    """
    with ExitStack() as contexts:
        contexts.enter_context(use_default_dtype(choose_comparison_dtype(config)))
        if bug:
            contexts.enter_context(bugs.plant_bug(bug))
        return _record_trace(config, steps, lr_decay)


def choose_comparison_dtype(config: Config) -> torch.dtype:
    """Return the default dtype of a run: fp64 in place of fp32, or fp32 if the run tests a lower precision."""
    return torch.float64 if config.precision == "fp32" else torch.float32


@contextmanager
def use_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new tensors in this dtype inside the context."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _record_trace(config: Config, steps: int, lr_decay: float) -> RankTrace:
    engine, rank_trace = RecordingEngine(config, torch.device("cpu")), RankTrace()
    for step in range(steps):
        report = train_step(engine, make_batches(config, engine, step), config.optim.lr * lr_decay**step, step)
        rank_trace.losses.append(report.loss.item())
        rank_trace.loss_denominators.append(report.loss_denominator.item())
        rank_trace.grad_norms.append(report.grad_norm.item())
        if engine.router_stats:
            counts = {layer: stats.counts_E.tolist() for layer, stats in engine.router_stats.items()}
            rank_trace.expert_counts.append(counts)
        if step in (0, steps - 1):
            rank_trace.record(engine)
    return rank_trace


def trace_one_process(config: Config, *, steps: int, lr_decay: float = 1.0) -> Trace:
    """Return the reference: the trace of one process without parallelism, recomputation or compilation.

    The global batch is one microbatch. Each learning rate is `lr_decay` times that of the previous step.
    """
    data = config.data.model_copy(update={"micro_batch": GLOBAL_BATCH})
    one_process = config.model_copy(update={"data": data, "parallel": ParallelConfig(dp_shard=1), "compile": False})
    return _trace_one_process(one_process.model_dump_json(), steps, lr_decay)


@lru_cache(maxsize=64)
def _trace_one_process(config_json: str, steps: int, lr_decay: float) -> Trace:
    return merge_ranks([record_trace(Config.model_validate_json(config_json), steps=steps, lr_decay=lr_decay)])


def merge_ranks(by_rank: Sequence[RankTrace]) -> Trace:
    """Merge the traces of all ranks into one trace with full tensors. The index in `by_rank` is the rank.

    Raises AssertionError unless the values that several ranks report are equal bit for bit.
    """
    rank_0 = by_rank[0]
    for rank, rank_trace in enumerate(by_rank[1:], 1):
        for name in ("losses", "loss_denominators", "grad_norms", "expert_counts"):
            assert getattr(rank_trace, name) == getattr(rank_0, name), f"{name} of rank {rank} differ from rank 0"
    shapes = {name: shape for rank_trace in by_rank for name, shape in rank_trace.shapes.items()}
    gradients = [
        merge_shards(shards, shapes) for shards in zip(*(rank_trace.gradients for rank_trace in by_rank), strict=True)
    ]
    parameters = [
        merge_shards(shards, shapes) for shards in zip(*(rank_trace.parameters for rank_trace in by_rank), strict=True)
    ]
    scalars = rank_0.losses, rank_0.loss_denominators, rank_0.grad_norms, rank_0.expert_counts
    return Trace(*scalars, gradients, parameters)


def merge_shards(by_rank: Sequence[ShardsByName], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Assemble full tensors of the given shapes from the shards of all ranks; return them by name.

    Raises AssertionError if overlapping shards are not equal bit for bit, or if an element is missing.
    """
    full_tensors = {}
    for name in (name for name in shapes if any(name in shards for shards in by_rank)):
        dtype = next(shard.dtype for shards in by_rank for _, shard in shards.get(name, []))
        full = torch.full(shapes[name], torch.nan, dtype=dtype)
        for rank, shards in enumerate(by_rank):
            for offset, shard in shards.get(name, []):
                slices = tuple(slice(start, start + size) for start, size in zip(offset, shard.shape, strict=True))
                previous = full[slices]
                is_equal = previous.isnan().all() or torch.equal(previous, shard)
                assert is_equal, f"{name} of rank {rank} differs from the copy of an earlier rank"
                full[slices] = shard
        assert not full.isnan().any(), f"{name}: some elements are on no rank"
        full_tensors[name] = full
    return full_tensors


def assert_matches_one_process(
    layout: Layout, *, optim: dict[str, Any], steps: int, bug: str | None = None, **sections: Any
) -> None:
    """Run the layout on its number of ranks; raise AssertionError unless it computes the steps of one process.

    `bug` is the name of a bug that is planted in the layout only. The other arguments are those of
    `make_layout_config`.
    """
    config = make_layout_config(layout, optim=optim, **sections)
    assert_config_matches_one_process(config, ranks=layout.ranks, steps=steps, bug=bug)


def assert_config_matches_one_process(
    config: Config, *, ranks: int, steps: int, bug: str | None = None, later_tolerance: float | None = None
) -> None:
    """Do the same as `assert_matches_one_process` for a resolved config.

    `later_tolerance` is the relative tolerance of the steps after the first, as in `assert_traces_match`.
    """
    if config.compile:
        restart_world(ranks)
    actual_trace = merge_ranks(get_world(ranks).run(record_trace, config, steps=steps, bug=bug))
    assert_traces_match(actual_trace, trace_one_process(config, steps=steps), later_tolerance=later_tolerance)


def assert_traces_match(
    actual_trace: Trace,
    expected_trace: Trace,
    *,
    first_tolerance: float | None = None,
    later_tolerance: float | None = None,
) -> None:
    """Raise AssertionError unless two traces match: counts of valid tokens exactly, all other values approximately.

    The tolerance is `first_tolerance` in step 1 and `later_tolerance` in the steps after step 1. Tolerances are
    relative to the largest element of each tensor. The defaults are 1e-11 for fp64. For other dtypes, they are 1e-5 in
    step 1 and 1e-4 in the steps after step 1.
    """
    is_fp64 = next(iter(actual_trace.parameters[0].values())).dtype == torch.float64
    first_tolerance = first_tolerance or (1e-11 if is_fp64 else 1e-5)
    later_tolerance = later_tolerance or (1e-11 if is_fp64 else 1e-4)
    assert actual_trace.loss_denominators == expected_trace.loss_denominators, (
        f"loss denominators {actual_trace.loss_denominators}, one process {expected_trace.loss_denominators}"
    )
    assert actual_trace.expert_counts == expected_trace.expert_counts, "the numbers of tokens of the experts differ"
    for label, actual_values, expected_values in (
        ("loss", actual_trace.losses, expected_trace.losses),
        ("gradient norm", actual_trace.grad_norms, expected_trace.grad_norms),
    ):
        for step, (actual_value, expected_value) in enumerate(zip(actual_values, expected_values, strict=True)):
            tolerance = first_tolerance if step == 0 else later_tolerance
            actual, expected = to_fp64_scalar(actual_value), to_fp64_scalar(expected_value)
            assert_close(f"{label} of step {step + 1}", actual, expected, tolerance)
    for index, tolerance, step_name in ((0, first_tolerance, "first step"), (-1, later_tolerance, "last step")):
        for kind in ("gradients", "parameters"):
            actual_tensors, expected_tensors = getattr(actual_trace, kind)[index], getattr(expected_trace, kind)[index]
            assert actual_tensors.keys() == expected_tensors.keys(), (
                f"{kind}: {actual_tensors.keys() ^ expected_tensors.keys()}"
            )
            # A gradient that is zero in exact arithmetic consists of the rounding errors of its summands. An example is
            # the gradient of a key bias without RoPE.
            rounding = 1e-14 if is_fp64 else 1e-7
            noise = rounding * max(float(value.abs().max()) for value in expected_tensors.values())
            for name, expected in expected_tensors.items():
                assert_close(f"{kind[:-1]} {name}, {step_name}", actual_tensors[name], expected, tolerance, noise)


def to_fp64_scalar(value: float) -> Tensor:
    """Return a tensor with one element."""
    return torch.tensor(value, dtype=torch.float64)


def assert_close(label: str, actual: Tensor, expected: Tensor, tolerance: float, noise: float = 0.0) -> None:
    """Raise AssertionError if the largest difference exceeds `tolerance` times the largest element plus `noise`.

    `tolerance` is relative, `noise` is absolute, and `label` starts the error message.
    """
    largest_element = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    assert difference <= tolerance * largest_element + noise, (
        f"{label}: off by {difference:.2e}; the largest element is {largest_element:.2e}, "
        f"the relative tolerance {tolerance:.0e}"
    )


def save_checkpoint(store: CheckpointStore, engine: Engine, progress: Progress, files: dict[str, bytes]) -> Path:
    """Save a checkpoint, wait until it is on disk, and return its path.

    `files` are further files of the checkpoint: {name: content}.
    """
    store.save(engine.state, progress, files)
    store.finish()
    path = (store.directory / f"step_{progress.step:08d}").local_path
    assert path is not None
    return path
