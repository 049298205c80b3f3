"""An import reports each tensor and each config field that it cannot use."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.config.compare import get_function_keys
from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_config import build_hf_config, parse_hf_config
from dist_llm.convert.hf_config_fields import HARMLESS_FIELDS
from dist_llm.convert.hf_export import to_huggingface
from dist_llm.convert.hf_import import find_unused_heads, from_huggingface
from dist_llm.convert.nanogpt import parse_nanogpt
from dist_llm.convert.native_shapes import list_native_shapes
from dist_llm.convert.weights import DictWeights, open_huggingface
from dist_llm.errors import CheckpointError
from tests.cli_runner import make_cli_runner
from tests.convert.families import FAMILIES, VOCAB, build_hf_model
from tests.fuzz.readers import READERS


def make_model(family: str) -> ModelConfig:
    """Return the model section of a small model of the family."""
    return parse_hf_config(build_hf_model(family).config.to_dict())


# Fields without an effect on the function: lengths that do not limit the model, and disabled windows.
NO_EFFECT = {
    *(
        "max_position_embeddings",
        "n_positions",
        "seq_length",
        "sliding_window",
        "use_sliding_window",
        "no_rope_layer_interval",
    ),
    "multi_query",  # of the older architecture of Falcon
}


def make_fields(family: str) -> dict[str, Any]:
    """Return the config that our export writes for a small model of the family."""
    fields = build_hf_config(make_model(family), family)
    return fields if "layer_types" in fields else {**fields, "use_sliding_window": False, "sliding_window": None}


def make_other_value(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value * 2
    if isinstance(value, dict):
        return {"rope_type": "linear", "factor": 2.0}
    return "gelu" if value == "relu" else "relu"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_used_or_reported(family: str) -> None:
    """With another value of a field, the model's function differs, or an error names the field."""
    hf_fields = make_fields(family)
    expected = get_function_keys(parse_hf_config(hf_fields))
    for name in hf_fields.keys() - {"model_type"} - HARMLESS_FIELDS - NO_EFFECT:
        assert import_function_or_error({**hf_fields, name: make_other_value(hf_fields[name])}) != expected, name


def import_function_or_error(hf_fields: dict[str, Any]) -> dict[str, Any] | None:
    """Return the function that the config describes; None if an error names a field."""
    try:
        return get_function_keys(parse_hf_config(hf_fields))
    except CheckpointError:
        return None


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_field_has_the_default_of_transformers(family: str) -> None:
    """If there is no default, the import requires the field. The test removes each field; transformers completes it."""
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, FAMILIES[family][0])
    content = build_hf_model(family).config.to_dict()
    wrong = []
    for name in content.keys() - {"model_type", "architectures"}:
        without = {key: value for key, value in content.items() if key != name}
        try:
            completed = import_function_or_error(config_class(**without).to_dict())
        except Exception:  # transformers rejects the rest
            continue
        if import_function_or_error(without) not in (completed, None):
            wrong.append(name)
    assert wrong == []


def test_layers_of_smollm3_without_layer_types_have_the_windows_of_transformers() -> None:
    """The layers without rotation have the windows."""
    config = build_hf_model("smollm3", use_sliding_window=True, sliding_window=4).config.to_dict()
    assert "sliding_attention" in config["layer_types"]
    without = {name: value for name, value in config.items() if name != "layer_types"}
    assert get_function_keys(parse_hf_config(without)) == get_function_keys(parse_hf_config(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_field_is_reported(family: str) -> None:
    hf_fields = make_fields(family)
    with pytest.raises(CheckpointError, match=r"the field residual_scale \(0\.5\) .*--ignore-field residual_scale"):
        parse_hf_config({**hf_fields, "residual_scale": 0.5})
    assert parse_hf_config({**hf_fields, "residual_scale": 0.5}, ["residual_scale"]) == parse_hf_config(hf_fields)
    assert parse_hf_config({**hf_fields, "residual_scale": None}) == parse_hf_config(hf_fields), (
        "null differs from a field that is not set"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "mscale": 0.5}}, "mscale 0.5 of rope"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, but 10000.0 in rope_parameters"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_an_unsupported_feature_is_reported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_hf_config({**make_fields("qwen3"), **changes})


def make_tensors(family: str) -> dict[str, torch.Tensor]:
    """Return zero tensors with the names and shapes of our export."""
    model = make_model(family)
    native = {f"model.{name}": torch.zeros(shape) for name, shape in list_native_shapes(model).items()}
    view = to_huggingface(DictWeights(native), model, family)
    return {name: view.read(name) for name in view.shapes}


@pytest.mark.parametrize(
    ("source", "family", "name"),
    [
        ("qwen2", "llama", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3", "llama", "model.layers.0.self_attn.k_norm.weight"),
        ("qwen3", "qwen2", "model.layers.0.self_attn.k_norm.weight"),
    ],
)
def test_biases_and_norms_are_not_dropped(source: str, family: str, name: str) -> None:
    """The folder has the tensors of one family and the config of another."""
    hf_tensors = make_tensors(source)
    model = make_model(source).model_copy(update={"qkv_bias": family == "qwen2", "qk_norm": False})
    with pytest.raises(CheckpointError, match=f"the tensor {name}.* has no counterpart in our model"):
        from_huggingface(DictWeights({name: hf_tensors[name]}), model, family)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
@pytest.mark.parametrize("extra", ["model.pooler.weight", "cls.seq_relationship.weight", "h.x.attn.bias", "x"])
def test_a_tensor_without_a_counterpart_is_reported(family: str, extra: str) -> None:
    hf_tensors = make_tensors(family) | {extra: torch.ones(2)}
    with pytest.raises(CheckpointError, match=f"the tensor {extra} .* has no counterpart"):
        from_huggingface(DictWeights(hf_tensors), make_model(family), family)


def test_unused_heads_of_bert_are_reported() -> None:
    hf_tensors = DictWeights(make_tensors("bert") | {"bert.pooler.dense.weight": torch.ones(2, 2)})
    from_huggingface(hf_tensors, make_model("bert"), "bert")
    assert find_unused_heads(hf_tensors) == ["bert.pooler.dense.weight"]


def test_an_unknown_argument_of_nanogpt_is_reported() -> None:
    arguments = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "bias": False, "vocab_size": VOCAB}
    model, _ = parse_nanogpt({"model_args": arguments | {"dropout": 0.0}, "model": {}})
    assert model.n_layers == 1
    with pytest.raises(CheckpointError, match="use_rotary"):
        parse_nanogpt({"model_args": arguments | {"use_rotary": True}, "model": {}})


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "pytorch_model.bin of many", "pytorch_model.bin of old"])
def test_torch_files_give_the_same_weights_as_safetensors(kind: str, tmp_path: Path) -> None:
    """The test reads one file, several files with an index, and a file in the format of torch before 1.6."""
    actual = {}
    for name in ("gpt2", kind):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        READERS[name].write(tmp_path / name)
        assert bool(list((tmp_path / name).glob("*.safetensors"))) == (name == "gpt2")
        weights = open_huggingface(tmp_path / name)
        actual[name] = {key: weights.read(key) for key in weights.shapes}
        assert make_cli_runner("convert")("from-hf", tmp_path / name, tmp_path / f"{name} of ours") == 0
    assert actual["gpt2"].keys() == actual[kind].keys()
    for key, tensor in actual["gpt2"].items():
        assert torch.equal(actual[kind][key], tensor), key
    assert make_cli_runner("convert")("diff", tmp_path / "gpt2 of ours", tmp_path / f"{kind} of ours") == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has neither \.safetensors files nor pytorch_model\.bin"):
        open_huggingface(tmp_path / "empty")
