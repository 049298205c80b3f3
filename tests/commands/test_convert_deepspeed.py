"""The parameter groups of a DeepSpeed checkpoint are those of the optimizer of the config."""

import pytest

from dist_llm.commands.convert_deepspeed import build_optimizer_groups
from dist_llm.errors import CheckpointError
from tests.laws.law import make_config
from tests.laws.layouts import ADAMW, COMPLETEP


def test_groups_have_the_factors_of_the_parametrization_and_of_the_patterns() -> None:
    optim = {**ADAMW, "groups": [{"pattern": "head.out.weight", "lr_mult": 0.25}]}
    groups = build_optimizer_groups(make_config(ranks=1, model=COMPLETEP, optim=optim))
    lr_mults = {
        name: setting["lr_mult"] for group, setting in zip(groups.names, groups.settings, strict=True) for name in group
    }
    assert lr_mults["head.out.weight"] == 0.25
    assert lr_mults["embed.tokens.weight"] == 1.0
    assert lr_mults["blocks.0.attention.q.weight"] == pytest.approx(0.25 * 2**-0.5)  # 4 times as wide, twice as deep


def test_frozen_parameters_are_refused() -> None:
    config = make_config(ranks=1, optim={**ADAMW, "groups": [{"pattern": "embed.*", "freeze": True}]})
    with pytest.raises(CheckpointError, match=r"embed\.tokens\.weight is frozen by optim\.groups"):
        build_optimizer_groups(config)
