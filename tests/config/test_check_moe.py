"""Each rule of a mixture of experts has a message with the keys, the rule and what to do."""

import pytest

from dist_llm.config.check import check
from tests.config.test_check import TOKENIZER_SIZE, make_config

MOE = {"name": "moe", "n_experts": 8, "top_k": 2, "d_expert": 16}


def find_messages(world_size=1, moe=None, **keys):
    """Return keys and message of each violation of a config with the experts of MOE. `moe` changes keys of MOE."""
    config = make_config(**{"model__feedforward": {**MOE, **(moe or {})}, **keys})
    violations = check(config, world_size, TOKENIZER_SIZE)
    return [f"{', '.join(violation.keys)}: {violation.message.splitlines()[0]}" for violation in violations]


def test_the_unchanged_config_is_valid():
    assert find_messages() == []
    assert (
        find_messages(moe={"n_groups": 4, "top_groups": 2, "balance_loss": 0.1, "balance_over": "previous_step"}) == []
    )


SECTION_RULES = [
    ({"top_k": 9}, "top_k, model.feedforward.n_experts: a token cannot use 9 of 8 experts; set at most 8"),
    (
        {"n_groups": 3},
        "n_groups, model.feedforward.n_experts: 8 experts do not divide into 3 groups; set one of 1, 2, 4, 8",
    ),
    ({"n_groups": 2, "top_groups": 3}, "top_groups, model.feedforward.n_groups: 3 is more than 2 groups"),
    (
        {"n_groups": 4, "top_groups": 1, "top_k": 3},
        "top_k, model.feedforward.top_groups: 1 groups have 2 experts, fewer than 3; raise top_groups, or lower top_k",
    ),
    (
        {"top_groups": 2},
        "top_groups: 2 has no effect without n_groups above 1; remove the key, or set n_groups above 1",
    ),
    (
        {"balance_over": "previous_step"},
        "balance_over: previous_step has no effect without balance_loss above 0; remove the key, or set balance_loss "
        "above 0",
    ),
    (
        {"selection_bias_rate": 0.1},
        "selection_bias_rate: 0.1 has no effect without selection_bias=true; remove the key, or set "
        "selection_bias=true",
    ),
    (
        {"d_expert": 12},
        "d_expert, model.feedforward.name: 12 is not a multiple of 8, which grouped matrix products need",
    ),
]


@pytest.mark.parametrize(("moe", "expected"), SECTION_RULES, ids=[",".join(moe) for moe, _ in SECTION_RULES])
def test_a_rule_of_the_section_names_keys_and_remedy(moe, expected):
    assert f"model.feedforward.{expected}" in find_messages(moe=moe)


OTHER_RULES = [
    (
        {"model__d_model": 36, "model__n_heads": 2, "model__n_kv_heads": 2},
        "model.d_model, model.feedforward.name: 36 is not a multiple of 8, which grouped matrix products need",
    ),
    (
        {"model__architecture": "encoder", "objective__name": "masked"},
        "model.feedforward.name, model.architecture: moe is not supported in an encoder; set architecture=decoder, or "
        "remove the section",
    ),
    (
        {"objective__name": "span"},
        "model.feedforward.name, objective.name: moe does not support span, whose padding would be routed and counted "
        "like text; set objective.name=causal or prefix, or remove the section",
    ),
    (
        {"data__windows": "packed"},
        "model.feedforward.name, data.windows: moe does not support windows=packed, whose padding would be routed and "
        "counted like text; set windows=stream, or remove the section",
    ),
    (
        {"engine": "accelerate"},
        "model.feedforward.name, engine: moe needs engine=native (now accelerate), which balances the experts once per "
        "step; set it, or remove the section",
    ),
    (
        {"model__parametrization": {"name": "mup", "base_d_model": 16}},
        "model.parametrization, model.feedforward.name: the rules of muP and CompleteP do not cover routers and "
        "experts; remove the key, or the section",
    ),
    (
        {"fp8": True},
        "fp8, model.feedforward.name: grouped matrix products of experts do not support float8; set fp8=false",
    ),
]


@pytest.mark.parametrize(("keys", "expected"), OTHER_RULES, ids=[next(iter(keys)) for keys, _ in OTHER_RULES])
def test_a_rule_of_other_keys_names_keys_and_remedy(keys, expected):
    assert expected in find_messages(**keys)


LAYOUT_RULES = [
    (
        2,
        {"parallel__ep": 4, "parallel__dp_shard": 2},
        "parallel.ep, parallel.dp_shard, parallel.cp, parallel.tp: 4 does not divide the 2 ranks of dp_shard x cp x "
        "tp; set one of 1, 2",
    ),
    (
        3,
        {"parallel__ep": 3, "parallel__dp_shard": 3},
        "model.feedforward.n_experts, parallel.ep: 8 experts do not divide over ep 3; ep can be 1, 2, 4, 8",
    ),
    (
        2,
        {"parallel__tp": 2, "parallel__sequence_parallel": False, "data__seq_len": 33},
        "data.seq_len, parallel.tp, parallel.cp, model.feedforward.name: 33 tokens do not divide over tp 2 x cp 1, "
        "over which a mixture of experts splits them; set a multiple of 2",
    ),
]


@pytest.mark.parametrize(
    ("world_size", "keys", "expected"), LAYOUT_RULES, ids=["ep and ranks", "ep and experts", "tokens"]
)
def test_a_rule_of_the_layout_names_keys_and_remedy(world_size, keys, expected):
    assert expected in find_messages(world_size, **keys)


def test_each_kind_of_layer_is_checked():
    kinds = {"a": {}, "b": {"feedforward": {**MOE, "top_k": 9}}}
    messages = find_messages(model__layers=["a", "b"], model__kinds=kinds)
    assert any("a token cannot use 9 of 8 experts" in message for message in messages)
