"""The list of families says what a model of each family must and can have, and comes from the tables of conversion."""

import importlib
from pathlib import Path

import pytest

from dist_llm.config.compare import MODEL_ROLES, MOE_TRAINING_KEYS
from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.model_section import UnresolvedModelConfig
from dist_llm.convert.hf_config import CLASSES, parse_hf_config
from dist_llm.convert.hf_family_list import FamilySummary, describe_settings, list_families
from tests.cli_runner import make_cli_runner
from tests.convert.families import FAMILIES, VARIANTS, build_hf_model

REPOSITORY = Path(__file__).parents[2]
SUMMARIES = {family.model_type: family for family in list_families()}
MODELS = VARIANTS | {family: (family, {}) for family in FAMILIES}


@pytest.mark.parametrize("name", MODELS)
def test_each_key_that_is_not_a_default_is_listed(name: str) -> None:
    pytest.importorskip("transformers")
    family, changes = MODELS[name]
    config = parse_hf_config(build_hf_model(family, **changes).config.to_dict())
    assert find_unlisted_keys(SUMMARIES[family], config) == []


def find_unlisted_keys(family: FamilySummary, config: UnresolvedModelConfig) -> list[str]:
    """Return the keys of a resolved model that are not free and differ from the default, or from the shared value."""
    free_keys, unlisted = {"vocab_size", "layers", "kinds", *family.free_keys}, []
    for key, role in MODEL_ROLES.items():
        actual, default = getattr(config, key), UnresolvedModelConfig.model_fields[key].default
        shared = family.shared_keys.get(key, default)
        if role == "training" or actual is None or shared == "sqrt(d_model)" or isinstance(actual, MoEConfig):
            continue
        if shared is None:  # a derived size
            shared = {"n_kv_heads": config.n_heads, "head_dim": config.d_model // config.n_heads}.get(key, 0)
        is_free = key in free_keys or f"kinds.{key}" in free_keys
        if actual != shared and not is_free:
            unlisted.append(f"{key}: {actual}")
        if is_free and family.free_keys.get(key) and actual not in family.free_keys[key]:
            unlisted.append(f"{key}: {actual}, not one of the listed values")
    if isinstance(config.feedforward, MoEConfig):
        unlisted += find_unlisted_router_keys(family, config.feedforward)
    for kind in config.kinds.values():
        unlisted += [f"kinds.{key}" for key in kind.list_overrides() if not is_listed_override(family, key)]
    return unlisted


def find_unlisted_router_keys(family: FamilySummary, moe: MoEConfig) -> list[str]:
    """Return the keys of `feedforward` that are not free and differ from the default, or from the shared value."""
    values = {
        f"feedforward.{key}": (getattr(moe, key), "dense" if key == "name" else field.default)
        for key, field in MoEConfig.model_fields.items()
        if key not in MOE_TRAINING_KEYS
    }
    return [
        f"{key}: {actual}"
        for key, (actual, default) in values.items()
        if key not in family.free_keys and actual != family.shared_keys.get(key, default)
    ]


def is_listed_override(family: FamilySummary, key: str) -> bool:
    """Return whether a kind may have this key. An import writes rotary_fraction 1 beside the other rotary keys."""
    return f"kinds.{key}" in family.free_keys or key == "rotary_fraction"


def test_a_key_that_the_family_lacks_is_reported() -> None:
    config = parse_hf_config({"model_type": "llama", **LLAMA}).model_copy(
        update={"qk_norm": True, "activation": "relu"}
    )
    assert find_unlisted_keys(SUMMARIES["llama"], config) == [
        "activation: relu, not one of the listed values",
        "qk_norm: True",
    ]


def test_a_key_of_the_router_that_the_family_lacks_is_reported() -> None:
    config = parse_hf_config(build_hf_model("mixtral").config.to_dict())
    moe = config.feedforward.model_copy(update={"n_groups": 2, "normalize_weights": False})
    assert find_unlisted_keys(SUMMARIES["mixtral"], config.model_copy(update={"feedforward": moe})) == [
        "feedforward.normalize_weights: False",
        "feedforward.n_groups: 2",
    ]
    assert "feedforward.name: moe" in find_unlisted_keys(SUMMARIES["llama"], config)


LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "hidden_act": "silu",
    "vocab_size": 61,
}


def test_the_table_of_the_document_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test compares all cells except the measured difference."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    program = importlib.import_module("families")
    table = program.DOCUMENT.read_text().split(program.TABLE_BEGIN)[1].split(program.TABLE_END)[0]
    assert table.startswith(program.HEADER)
    lines = table.removeprefix(program.HEADER).splitlines()
    for line, family in zip(lines, list_families(), strict=True):
        num_models = sum(name == family.model_type for name, _ in VARIANTS.values()) or 1
        expected = f"| {program.format_requirements(family)} | {num_models} | "
        assert line.startswith(expected), "run: python benchmarks/families.py --write"
        assert float(line.removeprefix(expected).removesuffix(" |")) < 1e-5


def test_the_command_prints_each_family_with_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_cli_runner("convert")("list-families") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model_type", "class", "of", "transformers", "settings"]
    assert [line.split()[:2] for line in lines] == [[name, hf_class] for name, hf_class in CLASSES.items()]
    settings = {family.model_type: describe_settings(family) for family in list_families()}
    assert all(line.endswith(text) for line, text in zip(lines, settings.values(), strict=True))
    for text in ("windows by layer", "capped scores", "norms with 1 + weight"):
        assert text in settings["gemma2"]
    assert settings["falcon"] == "LayerNorm, biases of norms, parallel sublayers, optional biases"
