"""Each planted bug makes the comparison with one process fail, on a layout that the bug affects.

The bugs are in bugs.py, moe_bugs.py and window_bugs.py. The comparison is that of law.py: a parallel layout must
compute the same training steps as one process. Layouts name their model, which has what the bug affects:

    tied              the head has the weight of the embedding
    encoder_decoder   two stacks share the embedding
    bounded           QK norm, a logit cap and stochastic depth
    olmo              a QK norm over all heads of a layer, and layers with different windows and RoPE
    bloom             ALiBi, with a slope per head
    sinks_and_gates   attention sinks and output gates, per head
    windows, gemma    sliding windows. With cp, a chunk needs the tokens before it that its windows reach: its halo
    moe, deepseek     experts; deepseek also has a selection bias, a shared expert and groups of experts
"""

import pytest

from tests.laws.bugs import BUGS
from tests.laws.law import assert_matches_one_process
from tests.laws.layouts import CLIPPED_SGD, DOCUMENTS, PREFIX, PROMPT_WEIGHTS, SGD, UL2, Layout
from tests.laws.worlds import WorldError

LAYOUT_OF_BUG = {
    "gradients_are_not_reduced_over_replicas": Layout(ranks=2, parallel={"dp_replicate": 2}),
    "gradients_are_not_reduced_over_shards": Layout(ranks=2, parallel={"dp_shard": 2}),
    "gradients_are_not_reduced_over_context_ranks": Layout(ranks=4, parallel={"dp_shard": 2, "cp": 2}),
    "gathered_input_gradients_are_not_reduce_scattered": Layout(ranks=2, parallel={"tp": 2}),
    "vocabulary_head_gradients_are_not_reduced_over_tensor_ranks": Layout(ranks=2, parallel={"tp": 2}),
    "token_slices_use_the_depth_scale_of_full_sequences": Layout(
        ranks=2, parallel={"tp": 2}, model="bounded", micro_batch=3
    ),
    "tensor_ranks_use_the_positions_of_the_first_rank": Layout(ranks=2, parallel={"tp": 2}, model="gpt", micro_batch=3),
    "tied_embedding_is_not_reduced_over_stages": Layout(ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6),
    "norm_layer_gradients_of_token_slices_are_not_reduced": Layout(ranks=2, parallel={"tp": 2}),
    "gradients_are_averaged_over_ranks": Layout(ranks=2, parallel={"dp_shard": 2}),
    "loss_is_the_mean_of_rank_means": Layout(ranks=2, parallel={"dp_shard": 2}),
    "loss_is_the_mean_of_microbatch_means": Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=4),
    "loss_is_divided_twice": Layout(ranks=2, parallel={"dp_shard": 2}),
    "loss_is_averaged_over_padding": Layout(ranks=2, parallel={"dp_shard": 2}),
    "loss_is_divided_by_the_number_of_weighted_targets": Layout(
        ranks=2, parallel={"dp_shard": 2}, sections=PROMPT_WEIGHTS
    ),
    "context_ranks_read_the_loss_weights_of_other_tokens": Layout(ranks=2, parallel={"cp": 2}, sections=PROMPT_WEIGHTS),
    "the_head_of_a_stage_ignores_loss_weights": Layout(
        ranks=2, parallel={"pp": 2}, micro_batch=6, sections=PROMPT_WEIGHTS
    ),
    "only_the_last_microbatch_is_accumulated": Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=4),
    "all_ranks_read_the_same_samples": Layout(ranks=2, parallel={"dp_shard": 2}),
    "gradients_are_clipped_by_the_local_norm": Layout(ranks=2, parallel={"dp_shard": 2}),
    "gradient_norm_counts_replicated_parameters_once_per_tensor_rank": Layout(ranks=2, parallel={"tp": 2}),
    "gradient_norm_counts_the_tied_embedding_in_both_stages": Layout(
        ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6
    ),
    "gradients_are_not_clipped": Layout(ranks=2, parallel={"dp_shard": 2}),
    "context_ranks_count_positions_from_zero": Layout(ranks=2, parallel={"cp": 2}),
    "causal_mask_is_aligned_to_the_first_key": Layout(ranks=2, parallel={"cp": 2}),
    "tied_head_uses_a_copy_of_the_embedding": Layout(ranks=2, parallel={"tp": 2}, model="tied"),
    "vocabulary_maximum_is_not_reduced_over_tensor_ranks": Layout(ranks=2, parallel={"tp": 2}),
    "vocabulary_padding_is_in_the_softmax": Layout(ranks=2, parallel={"tp": 2}),
    "all_ranks_initialize_the_same_shard": Layout(ranks=2, parallel={"dp_shard": 2}),
    "pipeline_rescales_gradients": Layout(ranks=2, parallel={"pp": 2}, micro_batch=6),
    "context_ranks_mask_queries_as_if_they_were_the_last": Layout(ranks=2, parallel={"cp": 2}, sections=PREFIX),
    "every_microbatch_uses_the_mask_of_the_first": Layout(ranks=2, parallel={"pp": 2}, micro_batch=6, sections=UL2),
    "stochastic_depth_differs_between_tensor_ranks": Layout(ranks=2, parallel={"tp": 2}, model="bounded"),
    "encoder_embedding_is_not_reduced_over_stages": Layout(
        ranks=2, parallel={"pp": 2}, model="encoder_decoder", micro_batch=6
    ),
    "weights_stay_gathered_after_the_last_backward": Layout(ranks=2, parallel={"dp_shard": 2}),
    "norm_over_all_heads_sees_only_the_heads_of_its_rank": Layout(ranks=2, parallel={"tp": 2}, model="olmo"),
    "norm_over_all_heads_does_not_reduce_its_gradient": Layout(ranks=2, parallel={"tp": 2}, model="olmo"),
    "every_tensor_rank_has_the_slopes_of_the_first_heads": Layout(ranks=2, parallel={"tp": 2}, model="bloom"),
    "every_tensor_rank_has_the_gates_of_the_first_heads": Layout(ranks=2, parallel={"tp": 2}, model="sinks_and_gates"),
    "every_tensor_rank_has_the_sinks_of_the_first_heads": Layout(ranks=2, parallel={"tp": 2}, model="sinks_and_gates"),
    "the_second_chunk_of_a_context_rank_has_no_sinks": Layout(ranks=2, parallel={"cp": 2}, model="sinks_and_gates"),
    "windows_ignore_documents": Layout(ranks=2, parallel={"tp": 2}, model="olmo", sections=DOCUMENTS),
    "windows_are_one_key_short_on_context_ranks": Layout(
        ranks=2, parallel={"cp": 2}, model="gemma", sections=DOCUMENTS
    ),
    "halos_are_one_token_short": Layout(ranks=2, parallel={"cp": 2}, model="windows"),
    "halos_are_joined_in_the_order_of_ranks": Layout(ranks=2, parallel={"cp": 2}, model="windows"),
    "halos_come_from_the_wrong_neighbor": Layout(ranks=4, parallel={"cp": 4}, model="windows"),
    "halos_belong_to_the_document_of_the_chunk": Layout(
        ranks=2, parallel={"cp": 2}, model="windows", sections=DOCUMENTS
    ),
    "gradients_of_halos_are_not_returned": Layout(ranks=2, parallel={"cp": 2}, model="windows"),
    "stages_use_the_rotations_of_the_first_layers": Layout(ranks=2, parallel={"pp": 2}, model="olmo", micro_batch=6),
    "qk_norm_gradients_are_not_reduced": Layout(
        ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="bounded"
    ),
    **{
        name: Layout(ranks=2, parallel={"dp_shard": 2, "ep": 2}, model="moe", micro_batch=4)
        for name in (
            "expert_gradients_are_multiplied_by_ep",
            "expert_gradients_are_averaged_over_data_ranks",
            "no_gradient_flows_through_the_weights_of_experts",
            "balance_losses_are_divided_by_the_number_of_microbatches",
            "balance_losses_are_means_over_the_sequences_of_a_rank",
            "balance_losses_are_divided_by_the_number_of_valid_tokens",
            "the_load_is_averaged_over_a_microbatch",
            "outputs_of_experts_are_weighted_twice",
            "received_rows_are_not_sorted_by_expert",
            "outputs_return_to_other_tokens",
            "expert_gradients_are_not_clipped",
            "all_ranks_initialize_the_same_experts",
            "tokens_choose_among_the_experts_of_their_rank",
        )
    },
    "expert_gradients_are_averaged_over_expert_shards": Layout(ranks=2, parallel={"dp_shard": 2}, model="moe"),
    "the_counts_of_a_sequence_are_not_summed_over_its_ranks": Layout(ranks=2, parallel={"cp": 2}, model="moe"),
    "the_router_z_loss_is_a_mean_over_the_tokens_of_a_rank": Layout(ranks=2, parallel={"cp": 2}, model="moe"),
    "the_gradient_norm_lacks_the_experts_of_other_tensor_ranks": Layout(
        ranks=2, parallel={"tp": 2, "ep": 2}, model="moe"
    ),
    "router_gradients_are_not_reduced_over_tensor_ranks": Layout(
        ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="moe"
    ),
    "every_tensor_rank_routes_all_tokens": Layout(ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="moe"),
    "the_selection_bias_follows_the_counts_of_one_rank": Layout(ranks=2, parallel={"dp_shard": 2}, model="deepseek"),
    "the_selection_bias_counts_the_forward_that_infers_shapes": Layout(
        ranks=2, parallel={"pp": 2}, model="deepseek", micro_batch=6
    ),
    "the_selection_bias_follows_the_last_microbatch": Layout(
        ranks=2, parallel={"dp_shard": 2}, model="deepseek", micro_batch=4
    ),
    "recomputation_counts_tokens_twice": Layout(
        ranks=2, parallel={"dp_shard": 2, "recompute": "full"}, model="deepseek", micro_batch=4
    ),
    "the_selection_bias_is_part_of_the_weights": Layout(ranks=2, parallel={"dp_shard": 2}, model="deepseek"),
    "shared_experts_are_left_out": Layout(ranks=2, parallel={"tp": 2}, model="deepseek"),
    "groups_of_experts_do_not_limit_the_choice": Layout(ranks=2, parallel={"dp_shard": 2, "ep": 2}, model="deepseek"),
}
# The layouts of all bugs, each once, by name. The name contains the microbatch size, which `str(layout)` omits.
DISTINCT_LAYOUTS = {layout.name: layout for layout in LAYOUT_OF_BUG.values()}
OPTIMIZER_BUG_NAMES = {  # tested in test_optimizers.py and test_param_groups.py
    "parameter_groups_ignore_their_learning_rate",
    "tensor_parallel_parameters_are_not_frozen",
    "matrices_are_orthogonalized_in_the_order_of_the_groups",
    "shards_are_orthogonalized_separately",
    "shards_are_returned_to_the_wrong_rank",
    "momentum_is_reset_before_each_step",
    "momentum_is_kept_on_the_first_rank_only",
    "stochastic_rounding_depends_on_the_local_index",
}
MESSAGES = (  # one of these must be in the error of a planted bug
    # A loss, norm, gradient or parameter is not that of one process. Most bugs have this effect.
    "off by",
    # Ranks have different values where all must have the same. This happens if a reduction over ranks is missing.
    "differ",
    # The number of valid tokens is wrong: loss_is_averaged_over_padding, all_ranks_read_the_same_samples.
    "loss denominators",
    # weights_stay_gathered_after_the_last_backward: which message appears depends on the version of torch.
    "gradients:",
    "parameters:",
    "Tensor list must have at least one tensor",
)
# The layouts on which bugs are also tested with compiled blocks.
COMPILED_LAYOUT_OF_BUG = {
    "gathered_input_gradients_are_not_reduce_scattered": Layout(
        ranks=4, parallel={"dp_shard": 2, "tp": 2}, model="tied"
    )
}


def test_every_bug_has_a_test() -> None:
    assert BUGS.keys() == LAYOUT_OF_BUG.keys() | OPTIMIZER_BUG_NAMES


@pytest.mark.parametrize("name", LAYOUT_OF_BUG)
def test_a_planted_bug_is_detected(name: str) -> None:
    with pytest.raises((AssertionError, WorldError), match="|".join(MESSAGES)):
        assert_matches_one_process(LAYOUT_OF_BUG[name], optim=CLIPPED_SGD, steps=2, bug=name)


@pytest.mark.parametrize("layout", DISTINCT_LAYOUTS.values(), ids=DISTINCT_LAYOUTS)
def test_the_layouts_of_the_bugs_match_one_process_without_a_bug(layout: Layout) -> None:
    assert_matches_one_process(layout, optim=CLIPPED_SGD, steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED_LAYOUT_OF_BUG)
def test_a_planted_bug_in_compiled_blocks_is_detected(name: str) -> None:
    assert_matches_one_process(COMPILED_LAYOUT_OF_BUG[name], optim=SGD, steps=1, compile=True)
    with pytest.raises(AssertionError, match=r"differ|off by"):
        assert_matches_one_process(COMPILED_LAYOUT_OF_BUG[name], optim=SGD, steps=1, bug=name, compile=True)
