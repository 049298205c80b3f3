"""Patterns of optim.groups select parameters by name, and a pattern without an effect is refused."""

from typing import Any

import pytest
import torch
from torch import nn

from dist_llm.config.optim_sections import AdamWConfig, ParamGroup
from dist_llm.optim.param_groups import build_param_groups, find_group_violations
from tests.optim.test_muon import SPECS, make_parameters


def make_optim(*groups: dict[str, Any], **keys: Any) -> AdamWConfig:
    return AdamWConfig(groups=tuple(ParamGroup(**group) for group in groups), **keys)


def get_settings(config: AdamWConfig) -> dict[str, tuple[float, float]]:
    """Return {name: (lr_mult, weight decay)} of the trained parameters."""
    parameters = make_parameters()
    names = {parameter: name for name, parameter in parameters.items()}
    return {
        names[parameter]: (group["lr_mult"], group["weight_decay"])
        for group in build_param_groups(config, parameters.items(), SPECS)
        for parameter in group["params"]
    }


def test_a_parameter_belongs_to_the_first_group_that_matches() -> None:
    config = make_optim(
        {"pattern": "blocks.*.up.weight", "lr_mult": 0.5, "weight_decay_mult": 2.0},
        {"pattern": "embed.*", "freeze": True},
        {"pattern": "blocks.?.attention.*", "lr_mult": 3.0},
        {"pattern": "*", "lr_mult": 7.0},
        weight_decay=0.25,
    )
    assert get_settings(config) == {
        "blocks.0.feedforward.up.weight": (0.5, 0.5),
        "blocks.0.attention.q.weight": (3.0, 0.25),
        "blocks.0.attention.q.bias": (3.0, 0.0),
        "blocks.0.norm_attention.weight": (7.0, 0.0),
        "head.out.weight": (7.0, 0.25),
    }


def test_without_groups_there_are_two_settings() -> None:
    groups = build_param_groups(AdamWConfig(), make_parameters().items(), SPECS)
    assert [(group["lr_mult"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1.0, 0.1, 3),
        (1.0, 0.0, 3),
    ]


def test_a_stage_without_trained_parameters_has_an_optimizer() -> None:
    (group,) = build_param_groups(
        make_optim({"pattern": "*", "freeze": True}), [("b", nn.Parameter(torch.ones(2)))], SPECS
    )
    assert group["params"] == []


@pytest.mark.parametrize(
    ("groups", "key", "message"),
    [
        ([{"pattern": "block.*", "lr_mult": 2.0}], "optim.groups.0.pattern", "names are embed.tokens.weight, blocks.0"),
        ([{"pattern": "Embed.*", "lr_mult": 2.0}], "optim.groups.0.pattern", "Embed.* matches no parameter"),
        (
            [{"pattern": "blocks.*", "lr_mult": 2.0}, {"pattern": "*.q.*", "lr_mult": 3.0}],
            "optim.groups.1.pattern",
            "earlier groups match all parameters that *.q.* matches",
        ),
        (
            [{"pattern": "*.bias", "weight_decay_mult": 2.0}],
            "optim.groups.0.weight_decay_mult",
            "does not apply to the parameters that *.bias matches (blocks.0.attention.q.bias)",
        ),
        ([{"pattern": "*", "freeze": True}], "optim.groups", "all parameters are frozen"),
    ],
)
def test_a_pattern_without_effect_is_refused(groups: list[dict[str, Any]], key: str, message: str) -> None:
    (violation,) = find_group_violations(make_optim(*groups), SPECS)
    assert violation.keys == (key,)
    assert message in violation.message


def test_groups_that_have_an_effect_are_accepted() -> None:
    config = make_optim({"pattern": "blocks.*", "weight_decay_mult": 2.0}, {"pattern": "*", "freeze": True})
    assert list(find_group_violations(config, SPECS)) == []
