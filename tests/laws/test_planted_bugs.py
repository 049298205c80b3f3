"""The law detects planted bugs: each bug, on a layout that it affects, makes the law fail."""

import pytest

from tests.laws.bugs import BUGS
from tests.laws.law import assert_matches_one_process
from tests.laws.layouts import CLIPPED_SGD, PREFIX, SGD, UL2, Layout
from tests.laws.worlds import WorldError

LAYOUT_OF_BUG = {
    "replicas_gradients_are_not_reduced": Layout(2, {"dp_replicate": 2}),
    "shards_gradients_are_not_reduced": Layout(2, {"dp_shard": 2}),
    "context_gradients_are_not_reduced": Layout(4, {"dp_shard": 2, "cp": 2}),
    "gathered_input_gradients_are_not_reduce_scattered": Layout(2, {"tp": 2}),
    "head_gradients_are_not_reduced_over_tensor_ranks": Layout(2, {"tp": 2}),
    "token_shards_use_the_depth_scale_of_full_rows": Layout(2, {"tp": 2}, "bounded", 3),
    "tensor_ranks_take_the_positions_of_the_first": Layout(2, {"tp": 2}, "gpt", 3),
    "tied_embedding_is_not_reduced_over_stages": Layout(2, {"pp": 2}, "tied", 6),
    "norm_gradients_of_sequence_slices_are_not_reduced": Layout(2, {"tp": 2}),
    "gradients_are_averaged_over_ranks": Layout(2, {"dp_shard": 2}),
    "mean_of_rank_means": Layout(2, {"dp_shard": 2}),
    "mean_of_microbatch_means": Layout(2, {"dp_shard": 2}, micro=4),
    "loss_divided_twice": Layout(2, {"dp_shard": 2}),
    "loss_averaged_over_padding": Layout(2, {"dp_shard": 2}),
    "last_microbatch_only": Layout(2, {"dp_shard": 2}, micro=4),
    "all_ranks_read_the_same_samples": Layout(2, {"dp_shard": 2}),
    "clipping_by_the_local_norm": Layout(2, {"dp_shard": 2}),
    "replicated_parameters_counted_once_per_tensor_rank": Layout(2, {"tp": 2}),
    "tied_embedding_counted_by_both_stages": Layout(2, {"pp": 2}, "tied", 6),
    "clipping_never_happens": Layout(2, {"dp_shard": 2}),
    "context_ranks_count_positions_from_zero": Layout(2, {"cp": 2}),
    "causal_mask_aligned_to_the_start": Layout(2, {"cp": 2}),
    "tied_head_untied_by_the_tensor_split": Layout(2, {"tp": 2}, "tied"),
    "vocabulary_maximum_is_not_shared": Layout(2, {"tp": 2}),
    "vocabulary_padding_is_scored": Layout(2, {"tp": 2}),
    "every_rank_initialised_with_the_same_shard": Layout(2, {"dp_shard": 2}),
    "pipeline_rescales_gradients": Layout(2, {"pp": 2}, micro=6),
    "context_ranks_treat_their_queries_as_the_last": Layout(2, {"cp": 2}, extra=PREFIX),
    "every_microbatch_uses_the_mask_of_the_first": Layout(2, {"pp": 2}, micro=6, extra=UL2),
    "stochastic_depth_differs_between_tensor_ranks": Layout(2, {"tp": 2}, "bounded"),
    "encoders_table_is_not_reduced_over_stages": Layout(2, {"pp": 2}, "two", 6),
    "weights_stay_gathered_after_the_last_backward": Layout(2, {"dp_shard": 2}),
    "gradients_of_head_norms_are_not_reduced": Layout(2, {"tp": 2, "sequence_parallel": False}, "bounded"),
}
OPTIMIZER_BUGS = {  # tested in test_optimizers.py
    "shards_orthogonalized_separately",
    "shards_returned_to_the_wrong_rank",
    "momentum_is_reset_before_each_step",
    "momentum_is_kept_on_the_first_rank_only",
    "moments_rounded_by_the_local_index",
}
COMPILED_BUGS = {"gathered_input_gradients_are_not_reduce_scattered": Layout(4, {"dp_shard": 2, "tp": 2}, "tied")}


def test_every_bug_has_a_test() -> None:
    assert BUGS.keys() == LAYOUT_OF_BUG.keys() | OPTIMIZER_BUGS
    assert len(BUGS) >= 15


@pytest.mark.parametrize("name", LAYOUT_OF_BUG)
def test_a_planted_bug_breaks_the_law(name: str) -> None:
    message = r"differ|off by|scored tokens|gradients:|parameters:|Tensor list must have at least one tensor"
    with pytest.raises((AssertionError, WorldError), match=message):
        assert_matches_one_process(LAYOUT_OF_BUG[name], CLIPPED_SGD, steps=2, bug=name)


@pytest.mark.parametrize("layout", {str(layout): layout for layout in LAYOUT_OF_BUG.values()}.values(), ids=str)
def test_the_law_holds_on_these_layouts_without_a_bug(layout: Layout) -> None:
    assert_matches_one_process(layout, CLIPPED_SGD, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_BUGS)
def test_a_planted_bug_in_compiled_blocks_breaks_the_law(name: str) -> None:
    assert_matches_one_process(COMPILED_BUGS[name], SGD, steps=1, compile=True)
    with pytest.raises(AssertionError, match=r"differ|off by"):
        assert_matches_one_process(COMPILED_BUGS[name], SGD, steps=1, bug=name, compile=True)
