"""Each layout of layouts.py computes the steps of one process: loss, gradients, gradient norm and weights.

Most of these tests are marked slow. By default, test_covering.py checks the layouts instead.
"""

from typing import Any

import pytest

from tests.laws.law import GLOBAL_BATCH, assert_matches_one_process
from tests.laws.layouts import ADAMW, ARCHITECTURE_LAYOUTS, CLIPPED_SGD, COMPILED_LAYOUTS, LAYOUTS, SGD, Layout


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_computes_the_step_of_one_process(layout: Layout) -> None:
    """With SGD at a learning rate of 1 and clipping, a wrong gradient scale or norm changes the weights."""
    assert_matches_one_process(layout, optim=CLIPPED_SGD, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ARCHITECTURE_LAYOUTS.values(), ids=ARCHITECTURE_LAYOUTS)
def test_every_architecture_and_objective_computes_the_step_of_one_process(layout: Layout) -> None:
    """On every layout, masks, cross-attention, position tables and stochastic depth compute what one process does."""
    assert_matches_one_process(layout, optim=CLIPPED_SGD, steps=2)


def test_the_lists_have_enough_layouts() -> None:
    assert len({str(layout) for layout in LAYOUTS.values()}) >= 45
    assert sum(layout.num_parallel_axes >= 3 for layout in LAYOUTS.values()) >= 12
    assert {layout.ranks for layout in LAYOUTS.values()} >= {2, 4, 8}
    assert len(COMPILED_LAYOUTS) >= 12


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", list(COMPILED_LAYOUTS.values())[::3], ids=list(COMPILED_LAYOUTS)[::3])
def test_recomputation_does_not_change_the_step(layout: Layout, recompute: str) -> None:
    assert_matches_one_process(layout, optim=SGD, steps=2, parallel={"recompute": recompute})


@pytest.mark.slow
def test_selective_recomputation_does_not_change_the_step_of_context_parallel() -> None:
    assert_matches_one_process(
        Layout(ranks=2, parallel={"cp": 2}), optim=SGD, steps=2, parallel={"recompute": "selective"}
    )


# An encoder, an encoder-decoder, and a prefix mask over context-parallel ranks.
OTHER_ARCHITECTURES = {
    name: ARCHITECTURE_LAYOUTS[name] for name in ("cp2_tp2_documents_bert", "tp2_micro3_t5", "cp2_prefix_llama")
}
TWENTY_STEPS: dict[str, Any] = {
    "dp_shard2_gpt": (),
    "dp_shard2_tp2_cpu_offload-True_micro4_tied": pytest.mark.slow,
    "pp2_dp_shard2_micro3_tied": pytest.mark.slow,
}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("layout", OTHER_ARCHITECTURES.values(), ids=OTHER_ARCHITECTURES)
def test_recomputation_does_not_change_the_step_of_other_architectures(layout: Layout, recompute: str) -> None:
    assert_matches_one_process(layout, optim=SGD, steps=2, parallel={"recompute": recompute})


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("layout", OTHER_ARCHITECTURES.values(), ids=OTHER_ARCHITECTURES)
def test_compilation_does_not_change_the_step_of_other_architectures(layout: Layout, recompute: str) -> None:
    assert_matches_one_process(layout, optim=SGD, steps=2, parallel={"recompute": recompute}, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compilation_does_not_change_the_step(recompute: str) -> None:
    assert_matches_one_process(
        COMPILED_LAYOUTS["dp_shard2_tp2_micro4_tied"],
        optim=SGD,
        steps=2,
        parallel={"recompute": recompute},
        compile=True,
    )


@pytest.mark.slow
def test_a_split_vocabulary_computes_label_smoothing_and_z_loss() -> None:
    assert_matches_one_process(
        Layout(ranks=2, parallel={"tp": 2}, model="tied"),
        optim=SGD,
        steps=2,
        loss={"label_smoothing": 0.1, "z_loss": 1e-2},
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in TWENTY_STEPS.items()])
def test_a_layout_computes_twenty_steps_of_adamw(name: str) -> None:
    assert_matches_one_process(LAYOUTS[name], optim=ADAMW, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [SGD, CLIPPED_SGD, ADAMW], ids=["sgd", "clipped", "adamw"])
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_computes_many_steps_with_each_optimizer(
    layout: Layout, num_microbatches: int, optim: dict[str, object]
) -> None:
    """Twenty steps of AdamW, three of SGD.

    A data-parallel rank without a pipeline takes its sequences in one microbatch or in three (four if 3 does not divide
    them).
    """
    dp_size = layout.parallel.get("dp_replicate", 1) * layout.parallel.get("dp_shard", 1)
    micro_batch = layout.micro_batch if "pp" in layout.parallel else GLOBAL_BATCH // dp_size // num_microbatches
    if "pp" in layout.parallel and num_microbatches == 3:
        pytest.skip("the pipeline schedule sets the number of microbatches")
    steps = 20 if optim["name"] == "adamw" else 3
    assert_matches_one_process(
        Layout(ranks=layout.ranks, parallel=layout.parallel, model=layout.model, micro_batch=micro_batch),
        optim=optim,
        steps=steps,
    )


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("layout", COMPILED_LAYOUTS.values(), ids=COMPILED_LAYOUTS)
def test_compilation_and_recomputation_together_do_not_change_the_steps(
    layout: Layout, recompute: str, compiled: bool
) -> None:
    assert_matches_one_process(layout, optim=CLIPPED_SGD, steps=3, parallel={"recompute": recompute}, compile=compiled)
