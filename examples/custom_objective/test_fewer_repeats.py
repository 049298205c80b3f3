"""The laws of the objective: every layout computes the loss, gradients and weights of one process, in fp64.

They use the law tests of dist_llm, so they run in a checkout of its repository, where this package is installed.
"""

import numpy as np
import pytest

from dist_llm.config.check import check
from dist_llm.config.objective_sections import ObjectiveSpec
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.config.section import parse_union
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from tests.laws.law import assert_config_matches_one_process, make_config, make_raw_config
from tests.laws.layouts import ADAMW, CLIPPED_SGD, DOCUMENTS

OBJECTIVE = {"name": "fewer_repeats", "distance": 30, "repeat_weight": 0.25}
MIXTURE = {"mixture": [OBJECTIVE, {"name": "causal", "weight": 2.0}]}
# (ranks, section parallel, sequences in a microbatch, further sections)
LAYOUTS = [
    (2, {"dp_shard": 2}, 4, {"optim": ADAMW, "objective": OBJECTIVE}),
    (2, {"tp": 2}, 3, {"optim": CLIPPED_SGD, "objective": MIXTURE}),
    (2, {"cp": 2}, 4, {"optim": CLIPPED_SGD, "objective": OBJECTIVE, **DOCUMENTS}),
    (8, {"pp": 2, "dp_shard": 2, "cp": 2}, 3, {"optim": CLIPPED_SGD, "objective": OBJECTIVE}),
]


@pytest.mark.parametrize(("ranks", "parallel", "micro_batch", "sections"), LAYOUTS, ids=str)
def test_a_layout_computes_the_steps_of_one_process(ranks, parallel, micro_batch, sections):
    data = {"micro_batch": micro_batch} | sections.get("data", {})
    config = make_config(ranks=ranks, parallel=parallel, **{**sections, "data": data})
    assert_config_matches_one_process(config, ranks=ranks, steps=2)


def test_the_law_notices_a_denominator_that_counts_targets(monkeypatch):
    """Planted bug: one process divides by the number of targets, not by the sum of their weights."""
    config = make_config(ranks=2, parallel={"dp_shard": 2}, optim=CLIPPED_SGD, objective=OBJECTIVE)
    monkeypatch.setattr(Batch, "loss_denominator", property(lambda batch: batch.num_valid_tokens))
    with pytest.raises(AssertionError):
        assert_config_matches_one_process(config, ranks=2, steps=1)


def test_repeated_tokens_weigh_less():
    config = make_config(ranks=1, objective=OBJECTIVE | {"distance": 2}, data={"seq_len": 6})
    objective = build_objective(config, ObjectiveVocabulary(10, 9))
    batch = objective(np.array([[5, 5, 7, 5, 1, 2, 5]]), np.array([0]))
    assert batch.targets_BS.tolist() == [[5, 7, 5, 1, 2, 5]]
    assert batch.loss_weights_BS.tolist() == [[0.25, 1, 0.25, 1, 1, 1]]
    assert batch.loss_denominator == 4.5


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        ({"repeat_weight": 2.0}, {}, "objective.repeat_weight: input should be less than or equal to 1"),
        ({"distnce": 3}, {}, "objective.distnce: extra inputs are not permitted"),
        ({"name": "fewer_repeat"}, {}, "objective.name: no installed package has fewer_repeat; set one of causal, "),
        ({}, {"architecture": "encoder"}, "objective.name: an objective of another package needs model.architecture"),
    ],
)
def test_a_wrong_config_is_refused(objective, model, message):
    raw = make_raw_config(model=model, objective=OBJECTIVE | objective)
    violations = check(UnresolvedConfig.model_validate(raw), world_size=1, tokenizer_size=0)
    assert [str(violation) for violation in violations if str(violation).startswith(message)], violations


def test_a_saved_objective_keeps_its_options():
    spec = parse_union(ObjectiveSpec, OBJECTIVE | {"weight": 2.0})
    assert parse_union(ObjectiveSpec, spec.model_dump()).model_dump() == OBJECTIVE | {"weight": 2.0}
