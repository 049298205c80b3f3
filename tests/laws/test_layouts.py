"""Every layout computes the step that one process computes: loss, each gradient, norm, each weight.

Long lists, by hand; `test_covering.py` has the cases that run every time.
"""

import pytest

from tests.laws.law import assert_matches_one_process
from tests.laws.layouts import ADAMW, CHOSEN, CLIPPED_SGD, FAMILIES, LAYOUTS, SGD, Layout


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_computes_the_step_of_one_process(layout: Layout) -> None:
    """SGD at lr 1, clipped: a wrong scale anywhere shows in the weights, a wrong norm too."""
    assert_matches_one_process(layout, CLIPPED_SGD, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", FAMILIES, ids=str)
def test_every_architecture_and_objective_keeps_the_law(layout: Layout) -> None:
    """Their masks, cross-attention, tables and what stochastic depth skips are the same on every layout."""
    assert_matches_one_process(layout, CLIPPED_SGD, steps=2)


def test_the_matrix_is_as_large_as_promised() -> None:
    assert len({str(layout) for layout in LAYOUTS}) >= 45
    assert sum(layout.axes >= 3 for layout in LAYOUTS) >= 12
    assert {layout.ranks for layout in LAYOUTS} >= {2, 4, 8}
    assert len(CHOSEN) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", CHOSEN[::3], ids=str)
def test_recomputation_changes_nothing(layout: Layout, recompute: str) -> None:
    assert_matches_one_process(layout, SGD, steps=2, parallel={"recompute": recompute})


@pytest.mark.slow
def test_selective_recomputation_and_context_parallel() -> None:
    assert_matches_one_process(Layout(2, {"cp": 2}), SGD, steps=2, parallel={"recompute": "selective"})


OTHERS = [FAMILIES[7], FAMILIES[10], FAMILIES[23]]  # an encoder, an encoder-decoder, a prefix over context ranks


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_recomputation_changes_nothing_in_other_architectures(layout: Layout, recompute: str) -> None:
    assert_matches_one_process(layout, SGD, steps=2, parallel={"recompute": recompute})


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_compilation_changes_nothing_in_other_architectures(layout: Layout, recompute: str) -> None:
    assert_matches_one_process(layout, SGD, steps=2, parallel={"recompute": recompute}, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compilation_changes_nothing(recompute: str) -> None:
    assert_matches_one_process(CHOSEN[7], SGD, steps=2, parallel={"recompute": recompute}, compile=True)


@pytest.mark.slow
def test_smoothing_and_z_loss_survive_the_split_of_the_vocabulary() -> None:
    assert_matches_one_process(
        Layout(2, {"tp": 2}, "tied"), SGD, steps=2, loss={"label_smoothing": 0.1, "z_loss": 1e-2}
    )


@pytest.mark.parametrize(
    "layout", [LAYOUTS[2], *(pytest.param(LAYOUTS[n], marks=pytest.mark.slow) for n in (24, 36))], ids=str
)
def test_twenty_steps_of_adamw(layout: Layout) -> None:
    assert_matches_one_process(layout, ADAMW, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [SGD, CLIPPED_SGD, ADAMW], ids=["sgd", "clipped", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_full_matrix(layout: Layout, accumulation: int, optim: dict[str, object]) -> None:
    """Twenty steps; layouts without a pipeline in one and in three microbatches."""
    data_ranks = layout.parallel.get("dp_replicate", 1) * layout.parallel.get("dp_shard", 1)
    micro = layout.micro if "pp" in layout.parallel else 24 // data_ranks // accumulation
    if "pp" in layout.parallel and accumulation == 3:
        pytest.skip("a pipeline's microbatches are its own")
    steps = 20 if optim["name"] == "adamw" else 3
    assert_matches_one_process(Layout(layout.ranks, layout.parallel, layout.model, micro), optim, steps)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("layout", CHOSEN, ids=str)
def test_the_chosen_dozen_compiled_and_recomputed(layout: Layout, recompute: str, compiled: bool) -> None:
    assert_matches_one_process(layout, CLIPPED_SGD, steps=3, parallel={"recompute": recompute}, compile=compiled)
