"""Unions of config sections: `name` selects the member class, and keys of other members are refused.

Configs that version 0.1.0 saved have the keys of all members. They can still be read.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_llm.config.check import check
from dist_llm.config.derive import resolve_config
from dist_llm.config.describe import describe_keys
from dist_llm.config.load import dump_config, load_config, load_saved_config, parse_saved_config
from dist_llm.config.objective_sections import MixtureConfig, ObjectiveSpec, SpanSpec
from dist_llm.config.optim_sections import ConstantConfig, MuonConfig, OptimConfig, ScheduleConfig, SGDConfig
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.config.section import get_union_members, parse_union

RUN: dict[str, Any] = {
    "run": {"dir": "runs/x", "steps": 20},
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "data": {"path": "corpus", "seq_len": 8, "global_batch": 12},
}
UNIONS = {"optim": OptimConfig, "schedule": ScheduleConfig, "objective": ObjectiveSpec}
# (section, a key of another member, what the message says)
MISPLACED = [
    ("optim", {"name": "sgd", "beta1": 0.8}, "beta1", "without optim.name=adamw or muon; remove the key"),
    ("optim", {"name": "sgd", "moments": "bf16"}, "moments", "without optim.name=adamw or muon"),
    ("optim", {"muon_momentum": 0.9}, "muon_momentum", "without optim.name=muon"),
    ("optim", {"momentum": 0.9}, "momentum", "without optim.name=sgd"),
    ("schedule", {"decay_fraction": 0.5}, "decay_fraction", "without schedule.name=wsd"),
    ("schedule", {"name": "constant", "min_ratio": 0.5}, "min_ratio", "cosine or linear or wsd or inverse_sqrt"),
    ("schedule", {"name": "inverse_sqrt", "decay_steps": 5}, "decay_steps", "schedule.name=cosine or linear or wsd"),
    ("objective", {"see_prefix": False}, "see_prefix", "without objective.name=prefix or span"),
    ("objective", {"mode": "R"}, "mode", "without objective.name=prefix or span"),
    ("objective", {"mask_rate": 0.3}, "mask_rate", "without objective.name=masked"),
    ("objective", {"name": "masked", "mean_span": 5.0}, "mean_span", "without objective.name=span"),
    ("objective", {"fim_rate": 0.9}, "fim_rate", "without objective.name=fim"),
    ("objective", {"mixture": [{"name": "fim"}], "fim_rate": 0.9}, "fim_rate", "beside objective.mixture"),
    (
        "objective",
        {"mixture": [{"name": "causal", "fim_rate": 0.9}, {"name": "fim"}]},
        "mixture.0.fim_rate",
        "without objective.mixture.0.name=fim",
    ),
]


@pytest.mark.parametrize(("section", "keys", "key", "message"), MISPLACED, ids=[key for _, _, key, _ in MISPLACED])
def test_a_key_of_another_member_is_refused(section: str, keys: dict[str, Any], key: str, message: str) -> None:
    config, violations = load_config({**RUN, section: keys})
    assert [violation.keys[0] for violation in violations] == [f"{section}.{key}"]
    assert message in violations[0].message
    assert config is not None, "there is no config with the other keys"


def test_every_key_of_some_members_is_tested() -> None:
    tested_keys = {(section, key.rpartition(".")[2]) for section, _, key, _ in MISPLACED}
    for section, annotation in UNIONS.items():
        members = get_union_members(annotation).values()
        for name in {name for member in members for name in member.model_fields}:
            if not all(name in member.model_fields for member in members):
                untested_names = {
                    "beta2",
                    "eps",
                    "implementation",
                    "on_extend",
                    "whole_words",
                    "noise_density",
                    "fim_spm_rate",
                }
                assert (section, name) in tested_keys or name in untested_names, f"{section}.{name}"


def test_a_wrong_name_lists_the_members() -> None:
    _, violations = load_config({**RUN, "optim": {"name": "adam", "lr": 1e-3}})
    assert [str(violation) for violation in violations] == [
        "optim.name: input should be 'adamw', 'muon', 'sgd', found 'adam'"
    ]
    config, violations = load_config({**RUN, "objective": {"mixture": [{"name": "causal"}, {"name": "spam"}]}})
    assert violations == []
    assert [str(violation) for violation in check(config, world_size=1, tokenizer_size=0)] == [
        "objective.mixture.1.name: no installed package has spam; set one of causal, fim, masked, prefix, span, or "
        "install the package that registers it"
    ]


def test_an_unknown_key_and_a_wrong_value_keep_their_location() -> None:
    _, violations = load_config({**RUN, "optim": {"name": "muon", "leerning_rate": 1.0, "beta1": 2.0, "lr": "fast"}})
    assert {violation.keys[0] for violation in violations} == {"optim.leerning_rate", "optim.beta1", "optim.lr"}
    _, violations = load_config({**RUN, "objective": {"mixture": [{"name": "span", "noise_density": 2.0}]}})
    assert violations[0].keys == ("objective.mixture.0.noise_density",)
    _, violations = load_config({**RUN, "schedule": 3})
    assert violations[0].keys == ("schedule",)


def test_the_name_of_a_section_selects_its_class() -> None:
    config, violations = load_config(
        {**RUN, "optim": {"name": "muon"}, "objective": {"mixture": [{"name": "span", "mode": "R"}, {}]}}
    )
    assert violations == []
    assert config is not None
    assert config.optim == MuonConfig()
    assert isinstance(config.objective, MixtureConfig)
    assert config.objective.components[0] == SpanSpec(mode="R")
    resolved = resolve_config(config, world_size=1, tokenizer_size=300)
    assert parse_saved_config(dump_config(resolved), "config.yaml") == resolved


# Version 0.1.0 saved all sizes, and 0 instead of null.
SAVED_SIZES = {
    "model": {
        **{
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "n_encoder_layers": 0,
            "n_kv_heads": 4,
            "head_dim": 8,
            "d_ff": 128,
        },
        **{"vocab_size": 300, "max_seq_len": 8, "attention_scale": 0.0, "logit_cap": 0.0},
    },
    "data": {"path": "corpus", "seq_len": 8, "global_batch": 12, "micro_batch": 12, "audit_every": 0},
    "parallel": {"dp_shard": 1, "activations_gib": 0.0},
}
# The keys of all members of a union, with values that version 0.1.0 accepted and did not use.
SAVED_UNIONS = {
    "optim": {
        **{"name": "sgd", "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "moments": "fp32"},
        **{"muon_momentum": 0.95, "momentum": 0.9, "weight_decay": 0.1, "decay_embeddings": False, "clip": 1.0},
        "implementation": "fused",
    },
    "schedule": {"name": "constant", "warmup_steps": 2, "decay_steps": 20, "decay_fraction": 0.2, "min_ratio": 0.1},
    "objective": {
        **{"name": "causal", "weight": 1.0, "mode": "", "see_prefix": True, "mask_rate": 0.3, "whole_words": False},
        **{"noise_density": 0.15, "mean_span": 3.0, "fim_rate": 0.5, "fim_spm_rate": 0.5, "mixture": []},
    },
}


def test_a_config_of_0_1_0_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**RUN, **SAVED_SIZES, **SAVED_UNIONS}))
    config = parse_saved_config(path.read_text(), "config.yaml")
    assert load_config(path)[1] == []
    assert load_saved_config(tmp_path) == config
    assert (config.model.attention_scale, config.model.logit_cap) == (None, None)
    assert config.optim == SGDConfig(lr=0.1, momentum=0.9)
    assert config.schedule == ConstantConfig(warmup_steps=2)
    assert config.objective == UnresolvedConfig.model_validate(RUN).objective
    assert check(config, world_size=1, tokenizer_size=300) == []


def test_saved_keys_of_another_version_are_ignored() -> None:
    assert parse_union(OptimConfig, {"name": "sgd", "lr": 0.1, "nesterov": True}) == SGDConfig(lr=0.1)


def test_the_help_names_the_members_that_have_a_key() -> None:
    row_by_key = {row[0]: row for row in describe_keys()}
    assert row_by_key["optim.name"][1] == "adamw | muon | sgd"
    assert row_by_key["optim.muon_momentum"][3] == "muon: Nesterov momentum"
    assert row_by_key["schedule.name"][2] == "cosine"
    assert row_by_key["optim.lr"][3] == "peak learning rate"
    assert row_by_key["objective.mixture"][2] == "none"
    assert row_by_key["objective.mode"][3].startswith("prefix, span: ")
