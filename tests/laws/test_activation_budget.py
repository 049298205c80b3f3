"""An activation budget limits what blocks save for backward as predicted, and does not change the step."""

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
from dist_llm.training.step import train_step
from tests.laws.law import assert_matches_one_process, make_batches, make_config, make_layout_config
from tests.laws.layouts import SGD, Layout
from tests.laws.worlds import get_world, restart_world, run_on_ranks

# torch 2.14 warns that tensors saved by selective checkpointing bypass the saved-tensor hooks that measure here.
pytestmark = pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
RECOMPUTE_LEVEL = {"none": 0, "selective": 1, "full": 2}


@dataclass
class SavedStorages:
    """Records the storages that blocks save for backward during a step.

    `bytes_by_ref` has the storages that exist now, `snapshots` those at the end of the forward pass of each block.
    """

    bytes_by_ref: dict[StorageWeakRef, int] = field(default_factory=dict)
    block: nn.Module | None = None  # whose forward pass runs now
    selective_storages: list[Any] = field(default_factory=list)  # of selective checkpointing
    snapshots: list[dict[StorageWeakRef, int]] = field(default_factory=list)

    def compute_peak(self) -> int:
        """Return the peak of the saved bytes.

        Storages that still exist after the step are not counted: pipeline stages receive into them.
        """
        gc.collect()
        return max(
            sum(num_bytes for ref, num_bytes in snapshot.items() if ref.expired()) for snapshot in self.snapshots
        )

    @contextmanager
    def recording(self, model_parts: Sequence[nn.Module]) -> Iterator[None]:
        """Record what the blocks of the model parts save during the `with` block."""

        def enter(module: nn.Module, *_: Any) -> None:
            self.block = module

        def leave(*_: Any) -> None:
            for storage in self.selective_storages:  # selective checkpointing saves tensors outside autograd
                self.record([getattr(value, "val", None) for value in pytree.tree_leaves(dict(storage))])
            self.selective_storages.clear()  # a reference here would outlive the graph
            self.block = None
            self.bytes_by_ref = {ref: num_bytes for ref, num_bytes in self.bytes_by_ref.items() if not ref.expired()}
            self.snapshots.append(dict(self.bytes_by_ref))

        create_contexts = activation_checkpoint.create_selective_checkpoint_contexts

        def create_recorded_contexts(policy: Any) -> Any:
            forward_context, recompute_context = create_contexts(policy)
            self.selective_storages.append(forward_context.storage)
            return forward_context, recompute_context

        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved))
            stack.enter_context(
                patch.object(activation_checkpoint, "create_selective_checkpoint_contexts", create_recorded_contexts)
            )
            for block in (block for model_part in model_parts for block in model_part.blocks.values()):  # type: ignore[union-attr, operator]
                stack.callback(block.register_forward_pre_hook(enter).remove)
                stack.callback(block.register_forward_hook(leave).remove)
            yield

    def pack(self, tensor: Tensor) -> Tensor:
        """Record a tensor that autograd saves, and return what autograd saves in its place."""
        if self.block is not None:
            self.record(tensor)
        return tensor.detach()

    def record(self, value: Any) -> None:
        """Record the storages of a saved value, except weights and their bf16 copies, recognized by their shape."""
        assert self.block is not None
        parameters = list(self.block.parameters())
        weight_pointers = {storage.data_ptr() for parameter in parameters for storage in iter_storages(parameter)}
        weight_shapes = {tuple(sorted(to_local(parameter).shape)) for parameter in parameters if parameter.ndim == 2}
        if (
            isinstance(value, Tensor)
            and value.dtype == torch.bfloat16
            and value.ndim == 2
            and tuple(sorted(value.shape)) in weight_shapes
        ):
            return
        for storage in iter_storages(value):
            if storage.data_ptr() not in weight_pointers:
                self.bytes_by_ref[StorageWeakRef(storage)] = storage.nbytes()


@dataclass
class BudgetReport:
    """The chosen recompute modes, and the bytes that blocks save for backward.

    `predicted` and `peak` are the predicted and the measured peak with these modes, `least` is the predicted peak with
    full recomputation, and `all_saved` that without recomputation.
    """

    modes: list[RecomputeMode]
    predicted: int
    peak: int
    least: int
    all_saved: int


def run_budgeted_step(config: Config) -> BudgetReport:
    """Run a step under a budget; return the measured peak and what `choose_modes` predicted."""
    engine = NativeEngine(config, torch.device("cpu"))
    reports: list[BudgetReport] = []

    def record(sizes: ActivationSizes, peak: Callable[[Sequence[int]], int], limit: int, selective: bool) -> Any:
        modes, predicted = choose_modes(sizes, peak, limit, selective)
        _, least = choose_modes(sizes, peak, budget_bytes=-1, selective=selective)
        all_saved = peak(sizes.bytes_by_model_part(["none"] * len(sizes.block_bytes)))
        reports.append(BudgetReport(modes, predicted, peak=0, least=least, all_saved=all_saved))
        return modes, predicted

    with patch.object(activation_budget, "choose_modes", record):
        engine._fit_activation_budget(engine.to_local_batch(make_batches(config, engine, step=0)[0]), 0)
    # In the first step, pipelines also infer the shapes of activations, so the second step is measured.
    train_step(engine, make_batches(config, engine, step=0), lr=1e-3, step=0)
    saved = SavedStorages()
    with saved.recording(engine.model_parts):
        train_step(engine, make_batches(config, engine, step=1), lr=1e-3, step=1)
    (report,) = reports
    assert [block.forward.mode for part in engine.model_parts for block in part.blocks.values()] == report.modes
    report.peak = saved.compute_peak()
    return report


def make_budget_config(layout: Layout, *, gib: float, **sections: Any) -> Config:
    """Return the config of a layout with an activation budget of `gib` GiB per rank."""
    return make_layout_config(layout, optim=SGD, parallel={"activations_gib": gib}, **sections)


def run_with_budget(layout: Layout, *, gib: float, **sections: Any) -> list[BudgetReport]:
    """Run a step under a budget of `gib` GiB on all ranks of the layout; return the reports by rank."""
    return run_on_ranks(layout.ranks, run_budgeted_step, make_budget_config(layout, gib=gib, **sections))


BF16 = {"precision": "bf16"}
DOCUMENTS = {"data": {"document_mask": True}}
CASES: list[Any] = [
    (Layout(ranks=1, micro_batch=6), {}),
    (Layout(ranks=1, micro_batch=6), BF16),
    (Layout(ranks=1, model="gpt", micro_batch=6), {"model": {"dropout": 0.1}}),
    (Layout(ranks=1, model="t5", micro_batch=6), {}),
    (Layout(ranks=1, model="bounded", micro_batch=6, sections=DOCUMENTS), {}),
    (Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=6), BF16),
    (Layout(ranks=2, parallel={"tp": 2}, model="tied", micro_batch=6), BF16),
    (Layout(ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="bert", micro_batch=6), {}),
    (Layout(ranks=2, parallel={"cp": 2}, micro_batch=6), {}),
    (Layout(ranks=2, parallel={"pp": 2}, micro_batch=6), {}),
    (Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "gpipe"}, model="encoder_decoder", micro_batch=6), {}),
    (Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "interleaved_1f1b"}, micro_batch=6), {}),
    (Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, micro_batch=3), {}),
    pytest.param(
        Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "interleaved_zero_bubble"}, micro_batch=3),
        {},
        marks=pytest.mark.slow,
    ),
    pytest.param(Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, micro_batch=6), {}, marks=pytest.mark.slow),
    pytest.param(Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2}, micro_batch=3), BF16, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "sections"), CASES, ids=str)
def test_saved_activations_fit_the_budget_and_the_prediction(layout: Layout, sections: dict[str, Any]) -> None:
    """The test covers each rank, with the largest budget, a middle one and the least one."""
    unlimited = run_with_budget(layout, gib=1.0, **sections)
    all_saved, least = max(report.all_saved for report in unlimited), max(report.least for report in unlimited)
    assert least < 0.2 * all_saved
    limit_bytes, recomputed_before = GIB, [0] * layout.ranks
    for fraction in (1.0, 0.55, 0.0):
        reports = unlimited
        if fraction < 1:
            limit_bytes = int(least + fraction * (all_saved - least)) + 1
            reports = run_with_budget(layout, gib=limit_bytes / GIB, **sections)
        for rank, report in enumerate(reports):
            assert report.peak <= report.predicted <= limit_bytes, f"rank {rank}, {fraction}: {report}"
            assert report.predicted - report.peak <= 0.02 * all_saved, f"rank {rank}, {fraction}: {report}"
            recomputed = sum(RECOMPUTE_LEVEL[mode] for mode in report.modes)
            assert recomputed >= recomputed_before[rank], "a smaller budget recomputes less"
            recomputed_before[rank] = recomputed
    assert max(recomputed_before) > 0


@pytest.mark.parametrize("parallel", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"pp": 2, "pp_schedule": "zbv"}], ids=str)
def test_a_budget_does_not_change_the_step(parallel: dict[str, Any]) -> None:
    """The blocks of one model use different recompute modes."""
    layout = Layout(ranks=2, parallel=parallel, model="tied", micro_batch=6)
    unlimited = run_with_budget(layout, gib=1.0)
    all_saved, least = max(report.all_saved for report in unlimited), max(report.least for report in unlimited)
    gib = (least + 0.4 * (all_saved - least)) / GIB
    assert len({mode for report in run_with_budget(layout, gib=gib) for mode in report.modes}) > 1
    assert_matches_one_process(layout, optim=SGD, steps=2, parallel={"activations_gib": gib})


@pytest.mark.slow
def test_the_prediction_holds_for_compiled_blocks() -> None:
    layout = Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=6)
    restart_world(2)
    unlimited, _ = run_with_budget(layout, gib=1.0, compile=True)
    gib = (unlimited.least + 0.9 * (unlimited.all_saved - unlimited.least)) / GIB
    for report in run_with_budget(layout, gib=gib, compile=True):
        assert set(report.modes) == {"none", "selective"}
        assert report.peak <= report.predicted <= report.peak * 1.02


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_blocks_save_no_more_than_eager_ones(precision: str) -> None:
    """With selective recomputation a block saves far more than its input, since it does not repeat matrix products."""
    (eager,), (compiled,) = (
        get_world(1).run(measure_saved_bytes, precision, is_compiled) for is_compiled in (False, True)
    )
    for block in (eager, compiled):
        assert 3 * block["full"] < block["selective"] < 0.8 * block["none"]
    assert 0.8 * eager["selective"] < compiled["selective"] <= eager["selective"]
    assert compiled["full"] == eager["full"]


def measure_saved_bytes(precision: str, compiled: bool) -> dict[RecomputeMode, int]:
    """Return the saved bytes of the first block of one process, by recompute mode."""
    sections = {"data": {"micro_batch": 6}, "parallel": {"activations_gib": 1.0}}
    config = make_config(ranks=1, **sections, precision=precision, compile=compiled)
    engine = NativeEngine(config, torch.device("cpu"))
    recorded_sizes: list[ActivationSizes] = []

    def record(sizes: ActivationSizes, *args: Any) -> Any:
        recorded_sizes.append(sizes)
        return choose_modes(sizes, *args)

    with patch.object(activation_budget, "choose_modes", record):
        engine._fit_activation_budget(engine.to_local_batch(make_batches(config, engine, step=0)[0]), 0)
    return recorded_sizes[0].block_bytes[0]


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}], ids=str)
def test_the_error_for_a_too_small_budget_gives_the_minimum(parallel: dict[str, Any]) -> None:
    """All ranks raise the same message, although the first stage of a pipeline saves more than the last."""
    layout = Layout(ranks=2 if parallel else 1, parallel=parallel, micro_batch=6)
    (message,) = set(run_on_ranks(layout.ranks, read_budget_error, make_budget_config(layout, gib=1e-6)))
    minimum = re.search(r"set at least ([0-9.e-]+),", message)
    assert minimum, message
    assert message.startswith("parallel.activations_gib: 1e-06 is less than the activations that backward needs")
    run_with_budget(layout, gib=float(minimum[1]))


def read_budget_error(config: Config) -> str:
    """Take a step, which must raise ConfigError; return its message."""
    engine = NativeEngine(config, torch.device("cpu"))
    with pytest.raises(ConfigError) as excinfo:
        train_step(engine, make_batches(config, engine, step=0), lr=1e-3, step=0)
    return str(excinfo.value)


def test_a_larger_budget_never_recomputes_more() -> None:
    """A larger budget uses fewer blocks with full recomputation, then fewer with selective recomputation."""
    bytes_by_mode: dict[RecomputeMode, int] = {"none": 100, "selective": 60, "full": 7}
    sizes = ActivationSizes([dict(bytes_by_mode) for _ in range(9)], [0] * 9, [11])
    counts_before: tuple[int, int] = (10, 10)
    num_mixed = 0
    for limit in range(9 * 7 + 11, 9 * 100 + 30):
        modes, saved_bytes = choose_modes(sizes, sum, limit)
        assert saved_bytes == 11 + sum(bytes_by_mode[mode] for mode in modes) <= limit
        counts = modes.count("full"), modes.count("selective")
        assert counts <= counts_before
        num_mixed += len(set(modes)) == 3
        counts_before = counts
    assert counts_before == (0, 0)
    assert num_mixed, "no limit needs all three modes"
    assert choose_modes(sizes, sum, budget_bytes=9 * 7 + 10)[1] == 9 * 7 + 11, (
        "the size is not the least size, although nothing fits"
    )
    assert "selective" not in {
        mode for limit in range(74, 911) for mode in choose_modes(sizes, sum, limit, selective=False)[0]
    }
