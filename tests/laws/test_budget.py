"""A budget of activations: what blocks really keep fits it, is what was foretold, and changes no step."""

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError
from dist_llm.parallel import activation_budget, activation_checkpoint
from dist_llm.parallel.activation_budget import GIB, ActivationSizes, choose_modes
from dist_llm.parallel.activation_checkpoint import RecomputeMode, iter_storages
from dist_llm.sharded import to_local
from dist_llm.train.step import train_step
from tests.laws.law import assert_matches_one_process, batches_of, config_of
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import restart_world, world

# torch 2.14 warns that what selective keeps passes by the hooks that measure it here, as ever.
pytestmark = pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
WORK = {"none": 0, "selective": 1, "full": 2}


@dataclass
class Live:
    """What blocks keep for backward, by watching a step from outside: now, and at the end of each block before."""

    refs: dict[StorageWeakRef, int] = field(default_factory=dict)
    block: nn.Module | None = None
    selective: list[Any] = field(default_factory=list)
    seen: list[dict[StorageWeakRef, int]] = field(default_factory=list)

    def most(self) -> int:
        """At one time, of what is gone after the step: what is still there is where stages receive from others."""
        gc.collect()
        return max(sum(size for ref, size in refs.items() if ref.expired()) for refs in self.seen)

    @contextmanager
    def watching(self, parts: Sequence[nn.Module]) -> Iterator[None]:
        def enter(module: nn.Module, *_: Any) -> None:
            self.block = module

        def leave(*_: Any) -> None:
            for stored in self.selective:  # what selective recomputation keeps, it keeps beside autograd
                self.note([getattr(each, "val", None) for each in pytree.tree_leaves(dict(stored))])
            self.selective.clear()  # to hold on to it would keep it longer than the graph does
            self.block = None
            self.refs = {ref: size for ref, size in self.refs.items() if not ref.expired()}
            self.seen.append(dict(self.refs))

        make = activation_checkpoint.create_selective_checkpoint_contexts

        def contexts(policy: Any) -> Any:
            both = make(policy)
            self.selective.append(both[0].storage)
            return both

        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept))
            stack.enter_context(patch.object(activation_checkpoint, "create_selective_checkpoint_contexts", contexts))
            for block in (block for part in parts for block in part.blocks.values()):  # type: ignore[union-attr, operator]
                stack.callback(block.register_forward_pre_hook(enter).remove)
                stack.callback(block.register_forward_hook(leave).remove)
            yield

    def pack(self, tensor: Tensor) -> Tensor:
        if self.block is not None:
            self.note(tensor)
        return tensor.detach()

    def note(self, kept: Any) -> None:
        """All but weights: parameters, and bf16 copies of them, which are told by their shape."""
        assert self.block is not None
        weights = {each.data_ptr() for p in self.block.parameters() for each in iter_storages(p)}
        shapes = {tuple(sorted(to_local(p).shape)) for p in self.block.parameters() if p.ndim == 2}
        if (
            isinstance(kept, Tensor)
            and kept.dtype == torch.bfloat16
            and kept.ndim == 2
            and tuple(sorted(kept.shape)) in shapes
        ):
            return
        for storage in iter_storages(kept):
            if storage.data_ptr() not in weights:
                self.refs[StorageWeakRef(storage)] = storage.nbytes()


@dataclass
class Found:
    modes: list[RecomputeMode]
    foretold: int
    most: int
    least: int
    every: int


def stepped(config: Config) -> Found:
    """A step under a budget: the most that was kept, and what `fit` thought of it."""
    engine = NativeEngine(config, torch.device("cpu"))
    seen: list[Found] = []

    def noting(kept: ActivationSizes, held: Callable[[Sequence[int]], int], most: int, selective: bool) -> Any:
        modes, size = choose_modes(kept, held, most, selective)
        _, least = choose_modes(kept, held, -1, selective)
        seen.append(Found(modes, size, 0, least, held(kept.bytes_by_model_part(["none"] * len(kept.blocks)))))
        return modes, size

    with patch.object(activation_budget, "choose_modes", noting):
        engine._fit_activation_budget(
            engine.to_local_batch(batches_of(config, engine, 0)[0]), 0
        )  # outside of what is watched
    train_step(engine, batches_of(config, engine, 0), 1e-3, 0)  # in the first, pipelines also learn their shapes
    live = Live()
    with live.watching(engine.model_parts):
        train_step(engine, batches_of(config, engine, 1), 1e-3, 1)
    (found,) = seen
    assert [block.forward.mode for part in engine.model_parts for block in part.blocks.values()] == found.modes
    found.most = live.most()
    return found


def config_with(layout: Layout, gib: float, **sections: Any) -> Config:
    parallel = layout.parallel | {"activations_gib": gib}
    data = {"micro_batch": layout.micro} | layout.extra.get("data", {})
    model = MODELS[layout.model] | sections.pop("model", {})
    return config_of(layout.ranks, model, **{**layout.extra, **sections, "data": data, "parallel": parallel})


def on_all(layout: Layout, gib: float, **sections: Any) -> list[Found]:
    config = config_with(layout, gib, **sections)
    return world(layout.ranks).run(stepped, config) if layout.ranks > 1 else [stepped(config)]


BF16 = {"precision": "bf16"}
DOCUMENTS = {"data": {"document_mask": True}}
CASES: list[Any] = [
    (Layout(1, {}, micro=6), {}),
    (Layout(1, {}, micro=6), BF16),
    (Layout(1, {}, "gpt", micro=6), {"model": {"dropout": 0.1}}),
    (Layout(1, {}, "t5", micro=6), {}),
    (Layout(1, {}, "bounded", micro=6, extra=DOCUMENTS), {}),
    (Layout(2, {"dp_shard": 2}, micro=6), BF16),
    (Layout(2, {"tp": 2}, "tied", micro=6), BF16),
    (Layout(2, {"tp": 2, "sequence_parallel": False}, "bert", micro=6), {}),
    (Layout(2, {"cp": 2}, micro=6), {}),
    (Layout(2, {"pp": 2}, micro=6), {}),
    (Layout(2, {"pp": 2, "pp_schedule": "gpipe"}, "two", micro=6), {}),
    (Layout(2, {"pp": 2, "pp_schedule": "interleaved_1f1b"}, micro=6), {}),
    (Layout(2, {"pp": 2, "pp_schedule": "zbv"}, micro=3), {}),
    pytest.param(Layout(2, {"pp": 2, "pp_schedule": "interleaved_zero_bubble"}, micro=3), {}, marks=pytest.mark.slow),
    pytest.param(Layout(4, {"dp_shard": 2, "tp": 2}, micro=6), {}, marks=pytest.mark.slow),
    pytest.param(Layout(4, {"pp": 2, "dp_shard": 2}, micro=3), BF16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "sections"), CASES, ids=str)
def test_what_is_kept_fits_the_budget_and_is_what_was_foretold(layout: Layout, sections: dict[str, Any]) -> None:
    """On each rank: all kept, a mix of choices, and as little as can be."""
    free = on_all(layout, 1.0, **sections)
    every, least = max(each.every for each in free), max(each.least for each in free)
    assert least < 0.2 * every
    most, before = GIB, [0] * layout.ranks
    for share in (1.0, 0.55, 0.0):
        if share < 1:
            most = int(least + share * (every - least)) + 1
        for rank, found in enumerate(free if share == 1 else on_all(layout, most / GIB, **sections)):
            assert found.most <= found.foretold <= most, f"rank {rank}, {share}: {found}"
            assert found.foretold - found.most <= 0.02 * every, f"rank {rank}, {share}: {found}"
            again = sum(WORK[mode] for mode in found.modes)
            assert again >= before[rank], "a smaller budget computes more again"
            before[rank] = again
    assert max(before) > 0


@pytest.mark.parametrize("parallel", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"pp": 2, "pp_schedule": "zbv"}], ids=str)
def test_a_budget_changes_no_step(parallel: dict[str, Any]) -> None:
    """Blocks of one model keep all, keep some and keep their input."""
    layout = Layout(2, parallel, "tied", micro=6)
    free = on_all(layout, 1.0)
    every, least = max(each.every for each in free), max(each.least for each in free)
    gib = (least + 0.4 * (every - least)) / GIB
    assert len({mode for found in on_all(layout, gib) for mode in found.modes}) > 1
    assert_matches_one_process(layout, SGD, steps=2, parallel={"activations_gib": gib})


@pytest.mark.slow
def test_a_budget_under_compilation() -> None:
    """Compiled blocks are measured as they are."""
    layout = Layout(2, {"dp_shard": 2}, micro=6)
    restart_world(2)
    free, _ = on_all(layout, 1.0, compile=True)
    for found in on_all(layout, (free.least + 0.9 * (free.every - free.least)) / GIB, compile=True):
        assert set(found.modes) == {"none", "selective"}
        assert found.most <= found.foretold <= found.most * 1.02


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_compiled_blocks_keep(precision: str) -> None:
    """Of selective ones no more than eager ones keep, and far more than their input: products are not repeated."""
    (eager,), (compiled,) = (world(1).run(measured, precision, each) for each in (False, True))
    for block in (eager, compiled):
        assert 3 * block["full"] < block["selective"] < 0.8 * block["none"]
    assert 0.8 * eager["selective"] < compiled["selective"] <= eager["selective"]
    assert compiled["full"] == eager["full"]


def measured(precision: str, compiled: bool) -> dict[RecomputeMode, int]:
    """Of the first block of one process, by choice."""
    sections = {"data": {"micro_batch": 6}, "parallel": {"activations_gib": 1.0}}
    config = config_of(1, {}, **sections, precision=precision, compile=compiled)
    engine = NativeEngine(config, torch.device("cpu"))
    seen: list[ActivationSizes] = []

    def noting(kept: ActivationSizes, *others: Any) -> Any:
        seen.append(kept)
        return choose_modes(kept, *others)

    with patch.object(activation_budget, "choose_modes", noting):
        engine._fit_activation_budget(engine.to_local_batch(batches_of(config, engine, 0)[0]), 0)
    return seen[0].blocks[0]


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}], ids=str)
def test_a_budget_that_nothing_fits_is_refused_with_the_least_that_fits(parallel: dict[str, Any]) -> None:
    """By every rank alike, though a pipeline's first keeps more than its last."""
    layout = Layout(2 if parallel else 1, parallel, micro=6)
    (told,) = set(
        world(2).run(refusal, config_with(layout, 1e-6)) if parallel else [refusal(config_with(layout, 1e-6))]
    )
    number = re.search(r"set at least ([0-9.e-]+),", told)
    assert number, told
    assert told.startswith("parallel.activations_gib: 1e-06 is less than what must be kept")
    on_all(layout, float(number[1]))


def refusal(config: Config) -> str:
    engine = NativeEngine(config, torch.device("cpu"))
    with pytest.raises(ConfigError) as caught:
        train_step(engine, batches_of(config, engine, 0), 1e-3, 0)
    return str(caught.value)


def test_more_budget_never_computes_more_again() -> None:
    """Few blocks are full, then few selective: of any budget the first order that fits, and none before it does."""
    size: dict[RecomputeMode, int] = {"none": 100, "selective": 60, "full": 7}
    kept = ActivationSizes([dict(size) for _ in range(9)], [0] * 9, [11])
    before: tuple[int, int] = (10, 10)
    mixed = 0
    for most in range(9 * 7 + 11, 9 * 100 + 30):
        modes, bytes_kept = choose_modes(kept, sum, most)
        assert bytes_kept == 11 + sum(size[mode] for mode in modes) <= most
        counts = modes.count("full"), modes.count("selective")
        assert counts <= before
        mixed += len(set(modes)) == 3
        before = counts
    assert before == (0, 0)
    assert mixed
    assert choose_modes(kept, sum, 9 * 7 + 10)[1] == 9 * 7 + 11, "what does not fit: the least that would"
    assert "selective" not in {
        each for most in range(74, 911) for each in choose_modes(kept, sum, most, selective=False)[0]
    }
