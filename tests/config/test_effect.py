"""Each key has an effect. A run reads the key, or a config in which no code reads the key is refused."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dist_llm.config.check import check
from dist_llm.config.check_effect import RULES
from dist_llm.config.model_section import LayerKind
from dist_llm.config.parametrization_sections import Parametrization
from dist_llm.config.rope_sections import RopeScaling
from dist_llm.config.section import Section, get_union_members
from dist_llm.config.sequence_lengths import compute_sequence_lengths
from dist_llm.data.shard import CorpusManifest, ShardWriter
from dist_llm.launch.world import World
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.training import settings
from dist_llm.training.run import train
from dist_llm.training.settings import read_config
from tests.config.test_check import make_config

# (overrides of a config in which the key has no effect, the key, what the message says)
WITHOUT_EFFECT = [
    ({"model__positions": "learned", "model__rope_theta": 5e5}, "model.rope_theta", "model.positions=rope"),
    ({"model__positions": "none", "model__rotary_fraction": 0.5}, "model.rotary_fraction", "model.positions=rope"),
    (
        {"model__positions": "none", "model__rope_scaling": {"name": "linear", "factor": 2.0}},
        "model.rope_scaling",
        "model.positions=rope",
    ),
    *(
        ({"model__bias": True, f"model__{name}": True}, f"model.{name}", "model.bias=false")
        for name in ("qkv_bias", "out_bias", "feedforward_bias")
    ),
    (
        {"model__feedforward": {"name": "moe", "n_experts": 8, "top_k": 2, "d_expert": 16}, "model__d_ff": 64},
        "model.d_ff",
        "feedforward.name=dense",
    ),
    ({"parallel__ep_dispatch": "padded"}, "parallel.ep_dispatch", "parallel.ep above 1"),
    ({"parallel__ep": 2}, "parallel.ep", "model.feedforward.name=moe"),
    ({"model__norm_bias": True}, "model.norm_bias", "model.norm=layernorm"),
    ({"model__head": "mlm", "model__head_bias": True}, "model.head_bias", "model.head=linear"),
    ({"model__relative_buckets": 16}, "model.relative_buckets", "model.positions=relative"),
    ({"model__relative_distance": 64}, "model.relative_distance", "model.positions=relative"),
    ({"optim__moments": "bf16", "optim__implementation": "foreach"}, "optim.implementation", "optim.moments=fp32"),
    ({"optim__weight_decay": 0.0, "optim__decay_embeddings": True}, "optim.decay_embeddings", "optim.weight_decay"),
    ({"parallel__pp_schedule": "gpipe"}, "parallel.pp_schedule", "parallel.pp above 1"),
    ({"parallel__pp_split": "count"}, "parallel.pp_split", "parallel.pp above 1"),
    ({"parallel__sequence_parallel": False}, "parallel.sequence_parallel", "parallel.tp above 1"),
    ({"parallel__async_tp": True}, "parallel.async_tp", "parallel.tp above 1"),
    ({"parallel__recompute_budget": 0.5}, "parallel.recompute_budget", "compile=true"),
    ({"guard__corrupt": "rewind", "guard__skip_steps": 3}, "guard.skip_steps", "guard.spike=rewind"),
    ({"guard__budget": 3}, "guard.budget", "skips or rewinds"),
    ({"eval__sample_tokens": 8}, "eval.sample_tokens", "eval.sample_prompt"),
    ({"objective__weight": 2.0}, "objective.weight", "without objective.mixture"),
    (
        {"data__path": "", "data__sources": [{"name": "a", "path": "a", "weight": 1.0, "epochs": 2.0}]},
        "data.sources.0.epochs",
        "beside a weight",
    ),
]


@pytest.mark.parametrize(("keys", "key", "message"), WITHOUT_EFFECT, ids=[key for _, key, _ in WITHOUT_EFFECT])
def test_a_key_without_effect_is_refused(keys: dict[str, Any], key: str, message: str) -> None:
    violations = [
        violation
        for violation in check(make_config(**keys), world_size=1, tokenizer_size=300)
        if violation.keys[0] == key
    ]
    assert len(violations) == 1
    assert message in violations[0].message


def test_every_rule_is_tested() -> None:
    tested_keys = {key for _, key, _ in WITHOUT_EFFECT}
    assert tested_keys >= {key for key, _, _ in RULES}


# Keys that need several ranks, another engine, a GPU or an error. Other tests show their effects.
READ_ELSEWHERE = {
    *(f"UnresolvedParallelConfig.{name}" for name in ("reshard", "reduce_each_microbatch", "cpu_offload", "async_tp")),
    *(f"UnresolvedParallelConfig.{name}" for name in ("sequence_parallel", "pp_schedule", "pp_split", "ep_dispatch")),
    "UnresolvedParallelConfig.recompute_budget",
    *(f"DeepSpeedConfig.{name}" for name in ("stage", "offload_optimizer", "offload_params", "config")),
    *(f"GuardConfig.{name}" for name in ("spike_z", "skip_steps", "budget")),
    "AccelerateConfig.plugin",
    "CheckpointConfig.probe",  # read if a probe differs
    # Read with classes of other packages (tests/test_custom_packages.py)
    *("LayerKeys.mixer_options", "RegisteredConfig.name", "RegisteredObjectiveSpec.name"),
    *(
        f"{section.__name__}.name"  # selects the class
        for union in (RopeScaling, Parametrization)
        for section in get_union_members(union).values()
    ),
}
LONG = {"factor": 2.0, "original_max_seq_len": 8}
ROPE_SCALINGS: list[dict[str, Any]] = [
    {"name": "linear", "factor": 2.0},
    {"name": "dynamic", **LONG},
    {"name": "llama3", **LONG},
    {"name": "yarn", **LONG},
    {"name": "longrope", "original_max_seq_len": 8, "short_factors": [1.0] * 4, "long_factors": [2.0] * 4},
    {"name": "longrope", "original_max_seq_len": 8, "short_factors": [1.0] * 4, "long_factors": [2.0] * 4, "length": 8},
]
# Short runs that together read every key.
RUNS: list[dict[str, Any]] = [
    {
        "eval": {"every": 1, "sample_prompt": "to", "sample_tokens": 2},
        "guard": {"spike": "skip", "replay_every": 1},
        "data": {"seq_len": 8},
    },
    {"run": {"dir": "run0", "steps": 3}, "data": {"on_change": "new_segment"}},
    {"init_from": "run0", "init_allow": ["objective"], "init_optimizer": "keep", "objective": {"name": "prefix"}},
    {
        "model": {"architecture": "encoder", "positions": "learned", "head": "mlm"},
        "objective": {"name": "masked"},
        "optim": {"name": "muon"},
        "schedule": {"name": "wsd"},
        "checkpoint": {"keep_best": 1, "every": 1},
        "eval": {"every": 1},
    },
    {
        "model": {"architecture": "encoder_decoder", "positions": "relative"},
        "objective": {"mixture": [{"name": "span", "mode": "R"}, {"name": "prefix", "mode": "S"}]},
        "optim": {"name": "sgd", "groups": [{"pattern": "blocks.*", "lr_mult": 0.5}]},
        "schedule": {"name": "inverse_sqrt"},
        "guard": {"not_finite": "rewind"},
    },
    {
        "objective": {"name": "span", "mode": "R"},
        "model": {"parametrization": {"name": "completep", "base_d_model": 4, "base_head_dim": 2, "base_n_layers": 1}},
    },
    {"model": {"parametrization": {"name": "mup", "base_d_model": 4}}},
    {
        "model": {
            "n_layers": len(ROPE_SCALINGS),
            "head_dim": 8,
            "norm": "layernorm",
            "norm_bias": True,
            "layers": [f"kind{index}" for index in range(len(ROPE_SCALINGS))],
            "kinds": {f"kind{index}": {"rope_scaling": scaling} for index, scaling in enumerate(ROPE_SCALINGS)},
        },
    },
    {
        "model": {
            "feedforward": {
                **{"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 16, "balance_loss": 0.1},
                **{"selection_bias": True, "n_groups": 2},
            },
        },
    },
    {
        "objective": {"name": "fim"},
        "data": {
            "path": "",
            "sources": [{"name": "a", "path": "."}, {"name": "b", "path": "."}],
            "stages": [{"from_tokens": 16, "weights": {"a": 1.0, "b": 3.0}}],
        },
    },
]


def iter_sections(section: type[Section] = Section) -> Iterator[type[Section]]:
    """Yield all classes of sections."""
    for child in section.__subclasses__():
        if child.__module__.startswith("dist_llm."):
            yield child
            yield from iter_sections(child)


def qualify_key(section: type[Section], name: str) -> str:
    """Return `Section.field`. `Section` is the base class that declares the field: members of a union share it."""
    return next(f"{kind.__name__}.{name}" for kind in reversed(section.__mro__) if name in get_fields(kind))


def get_fields(kind: type) -> Iterable[str]:
    """Return the fields of a pydantic model; of other types none."""
    return kind.model_fields if issubclass(kind, BaseModel) and kind is not BaseModel else ()


def list_keys() -> set[str]:
    """Return the keys whose values are not sections."""
    return {
        qualify_key(section, name)
        for section in iter_sections()
        for name, field in section.model_fields.items()
        if section is not LayerKind  # has the keys of LayerKeys; only those that are set are read
        if not re.search(r"dist_llm\.config\.\w+\.\w", str(field.annotation))
    }


def test_a_run_reads_every_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    read_keys: set[str] = set()
    read_attribute = Section.__getattribute__

    def record_and_read(self: Section, name: str) -> Any:
        if not name.startswith("_") and name in type(self).model_fields:
            read_keys.add(qualify_key(type(self), name))
        return read_attribute(self, name)

    for index, changed_sections in enumerate(RUNS):
        sections: dict[str, Any] = {
            "run": {"dir": f"run{index}", "steps": 2},
            "model": {"d_model": 8, "n_layers": 1, "n_heads": 2},
            "data": {"path": ".", "seq_len": 16, "global_batch": 2},
            "log": {"peak_tflops": 1.0},
        }
        for name, value in changed_sections.items():
            sections[name] = {**sections.get(name, {}), **value} if isinstance(value, dict) else value
        Path("config.yaml").write_text(json.dumps(sections))
        read_config(Path("config.yaml"), [], world_size=1)  # raises an error if the config violates a rule
        compute_sequence_lengths.cache_clear()
        with monkeypatch.context() as patch_context:
            patch_context.setattr(settings, "check", lambda *rest: [])  # reading a key in a rule is not an effect
            patch_context.setattr(Section, "__getattribute__", record_and_read)
            train(read_config(Path("config.yaml"), [], world_size=1), World())
    unread = list_keys() - read_keys
    assert not unread - READ_ELSEWHERE, f"keys that no run reads: {sorted(unread - READ_ELSEWHERE)}"


def write_corpus(directory: Path) -> None:
    """Write a corpus with one document in each split."""
    tokenizer = build_tokenizer("byte")
    tokenizer.save(directory)
    text = "to be or not to be, that is the question: " * 20
    shards = {}
    for split in ("train", "heldout"):
        with ShardWriter(directory, split, "uint16", max_tokens=1000) as writer:
            writer.add(tokenizer.encode(text), text_bytes=len(text))
            shards[split] = writer.close()
    CorpusManifest("uint16", tokenizer.vocab_size, tokenizer.sha256, ("here",), shards).save(directory)
