"""Families with experts: gradients, tensors of experts one at a time, and what an import and an export refuse."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.config.check_effect import check_effect
from dist_llm.config.load import load_config
from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_config import build_hf_config, parse_hf_config
from dist_llm.convert.hf_export import to_huggingface
from dist_llm.convert.hf_import import from_huggingface
from dist_llm.convert.hf_moe_families import MOE_FAMILIES
from dist_llm.convert.weights import DictWeights, LazyWeights, Weights
from dist_llm.errors import CheckpointError
from dist_llm.models import feedforward
from dist_llm.param_spec import iter_weights
from dist_llm.training.settings import read_model_section
from tests.cli_runner import make_cli_runner
from tests.convert.families import VARIANTS, VOCAB, build_hf_model, build_models, build_variant, to_hub_tensors

pytest.importorskip("transformers")

MAX_DIFFERENCE = 1e-5  # of a gradient, relative to its largest value
MOE_VARIANTS = [name for name, (family, _) in VARIANTS.items() if family in MOE_FAMILIES]
BY_EXPERT = ["mixtral", "qwen3_moe"]  # a tensor for each expert, with the two styles of names
FUSED = ["granitemoe", "gpt_oss"]


def compute_gradients(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of our model and, under our names, those of the model of transformers."""
    hf_model, native_model, config = build_variant(name)
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    for model in (hf_model, native_model):
        logits = model(input_ids=ids).logits if model is hf_model else model(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    hf_gradients = {key: parameter.grad for key, parameter in hf_model.named_parameters()}
    hf_gradients |= {key: buffer for key, buffer in hf_model.named_buffers() if key.endswith("correction_bias")}
    view = from_huggingface(DictWeights(to_hub_tensors(hf_model, hf_gradients)), config, VARIANTS[name][0])
    native = {key: parameter.grad for key, parameter in native_model.named_parameters() if parameter.grad is not None}
    assert native.keys() == dict(native_model.named_parameters()).keys()
    return native, {key: view.read(f"model.{key}") for key in native}


def find_differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the differences above MAX_DIFFERENCE by name."""
    differences = {
        name: float((actual[name] - gradient).abs().max() / gradient.abs().max()) for name, gradient in expected.items()
    }
    return {name: difference for name, difference in differences.items() if not difference < MAX_DIFFERENCE}


@pytest.mark.parametrize("name", MOE_VARIANTS)
def test_gradients_equal_those_of_transformers(name: str) -> None:
    actual, expected = compute_gradients(name)
    assert find_differences(actual, expected) == {}


def test_a_gradient_that_misses_an_expert_differs() -> None:
    """Negative control of the test above."""
    actual, expected = compute_gradients("mixtral")
    name = "blocks.1.feedforward.experts.down.weight"
    actual[name] = actual[name].roll(1, dims=0)
    assert list(find_differences(actual, expected)) == [name]


@torch.no_grad()
@pytest.mark.parametrize(("name", "value"), [("CLAMP_LIMIT", 1e9), ("SIGMOID_SLOPE", 1.6)])
def test_the_constants_of_the_clamped_activation_have_an_effect(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other constants than those of gpt-oss, the logits differ."""
    hf_model, native_model, _ = build_models("gpt_oss")
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = hf_model(input_ids=ids).logits
    assert (native_model(ids) - expected).abs().max() < 1e-5 * expected.abs().max()
    monkeypatch.setattr(feedforward, name, value)
    assert (native_model(ids) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_an_import_reads_the_fields_of_the_published_gpt_oss() -> None:
    """Its config.json has two names for the number of experts of a token, and the older fields of YaRN."""
    _, _, config = build_models("gpt_oss")
    fields = build_hf_config(config, "gpt_oss")
    rope = fields.pop("rope_parameters")
    del fields["swiglu_alpha"]
    published = {
        **fields,
        "experts_per_token": 3,
        "initial_context_length": 8,
        "rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"},
        "rope_theta": rope["rope_theta"],
    }
    assert parse_hf_config(published) == config
    for changes, message in (
        ({"experts_per_token": 2}, "experts_per_token 2 is not supported, only 3"),
        ({"swiglu_limit": 8.0}, "swiglu_limit 8.0 is not supported"),
        ({"rope_scaling": None}, "has neither rope_parameters nor rope_scaling"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
    ):
        with pytest.raises(CheckpointError, match=message):
            parse_hf_config({**published, **changes})


class CountingWeights(LazyWeights):
    """Weights that count the reads of each tensor."""

    def __init__(self, weights: Weights) -> None:
        self.num_reads: Counter[str] = Counter()

        def read(name: str) -> Tensor:
            self.num_reads[name] += 1
            return weights.read(name)

        super().__init__(weights.shapes, read)


def make_native_weights(family: str) -> tuple[DictWeights, ModelConfig]:
    """Return the weights of a small model under our names, and its config."""
    _, native_model, config = build_models(family)
    return DictWeights({f"model.{name}": tensor.detach() for name, tensor in iter_weights(native_model)}), config


@pytest.mark.parametrize("family", [*BY_EXPERT, *FUSED])
def test_an_export_reads_each_tensor_once_and_holds_one_layer(family: str) -> None:
    weights, config = make_native_weights(family)
    counting = CountingWeights(weights)
    view = to_huggingface(counting, config, family)
    assert counting.num_reads.total() == 0
    names = iter(view.shapes)
    while ".experts." not in (name := next(names)) and ".input_linear" not in name:
        continue
    counting.num_reads.clear()
    view.read(name)
    assert 1 <= counting.num_reads.total() <= 2, "the gate and the up projection of one layer at most"
    counting.num_reads.clear()
    for name in to_huggingface(counting, config, family).shapes:
        view.read(name)
    assert {name for name, count in counting.num_reads.items() if count > 1} == set()


@pytest.mark.parametrize("family", BY_EXPERT)
def test_an_import_reads_only_the_experts_of_the_requested_tensor(family: str) -> None:
    hf_model = build_hf_model(family)
    counting = CountingWeights(DictWeights(to_hub_tensors(hf_model, hf_model.state_dict())))
    view = from_huggingface(counting, parse_hf_config(hf_model.config.to_dict()), family)
    tensor = view.read("model.blocks.2.feedforward.experts.up.weight")
    assert len(counting.num_reads) == len(tensor) == counting.num_reads.total()
    assert {name.split(".")[2] for name in counting.num_reads} == {"2"}


@pytest.mark.parametrize("family", [family for family in MOE_FAMILIES if family != "qwen3_moe"])
def test_an_imported_load_is_equal_for_all_experts(family: str) -> None:
    """The buffer `previous_load` has no counterpart on the hub. It decides only balance_over=previous_step."""
    weights, config = make_native_weights(family)
    name = f"model.blocks.{config.n_layers - 1}.feedforward.previous_load"
    weights.tensors[name].copy_(torch.rand(weights.shapes[name]))
    hub = to_huggingface(weights, config, family)
    assert not any("load" in name for name in hub.shapes)
    loads = from_huggingface(hub, config, family).read(name)
    assert torch.equal(loads, torch.full_like(loads, 1 / len(loads)))


def test_the_bias_for_the_choice_of_experts_is_imported() -> None:
    hf_model, native_model, _ = build_models("glm4_moe")
    expected = hf_model.model.layers[1].mlp.gate.e_score_correction_bias
    assert expected.abs().min() > 0
    assert torch.equal(native_model.blocks["1"].feedforward.selection_bias, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: None, "lacks model.layers.1.mlp.experts.5.up_proj.weight"),
        (
            lambda tensor: tensor[:1],
            r"experts\.5\.up_proj\.weight gives .* the shape \[1, 32\] instead of",
        ),
    ],
    ids=["missing", "broadcastable"],
)
def test_an_expert_that_is_missing_or_too_small_is_reported(
    change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    hf_model = build_hf_model("olmoe")
    config = parse_hf_config(hf_model.config.to_dict())
    tensors = dict(to_hub_tensors(hf_model, hf_model.state_dict()))
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    changed = change(tensors.pop(name))
    weights = DictWeights(tensors | ({} if changed is None else {name: changed}))
    view = from_huggingface(weights, config, "olmoe")
    view.read("model.blocks.1.feedforward.experts.gate.weight")
    with pytest.raises(CheckpointError, match=message):
        view.read("model.blocks.1.feedforward.experts.up.weight")


def test_one_expert_more_than_the_config_says_is_reported() -> None:
    hf_model = build_hf_model("olmoe")
    tensors = dict(to_hub_tensors(hf_model, hf_model.state_dict()))
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = torch.ones(48, 32)
    with pytest.raises(CheckpointError, match=r"experts\.8\.up_proj.* has no counterpart"):
        from_huggingface(DictWeights(tensors), parse_hf_config(hf_model.config.to_dict()), "olmoe")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts 0 is not supported"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not supported"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers 1 is not a list"),
        ("mixtral", {"num_local_experts": 1}, "n_experts cannot be derived"),
    ],
)
def test_an_unsupported_router_is_reported(family: str, changes: dict[str, Any], message: str) -> None:
    _, _, config = build_models(family)
    with pytest.raises(CheckpointError, match=message):
        parse_hf_config({**build_hf_config(config, family), **changes})


def test_the_number_of_experts_has_two_names() -> None:
    """Files on the hub have num_experts; transformers 5 writes num_local_experts."""
    _, _, config = build_models("qwen3_moe")
    fields = build_hf_config(config, "qwen3_moe")
    number = fields.pop("num_experts")
    assert parse_hf_config({**fields, "num_local_experts": number}) == config


def test_an_export_refuses_dense_layers_that_the_family_cannot_place() -> None:
    """The dense layers of GLM-4.5 come first; those of Qwen may be anywhere; Mixtral has none."""
    _, _, config = build_models("glm4_moe")
    reversed_layers = config.model_copy(update={"layers": tuple(reversed(config.layers))})
    for family, model in (("glm4_moe", reversed_layers), ("mixtral", build_models("qwen3_moe").config)):
        with pytest.raises(CheckpointError, match=r"no equivalent of this model: .*feedforward"):
            build_hf_config(model, family)


def test_the_layer_that_predicts_further_tokens_is_reported_and_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf_model = build_hf_model("glm4_moe")
    hf_model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.ones(2, 2)}, file, metadata={"format": "pt"})
    run_convert = make_cli_runner("convert")
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "native", "--check") == 0
    assert "not converted: model.layers.3.*: a layer that predicts further tokens" in capsys.readouterr().out
    assert not any("layers.3" in name or "blocks.3" in name for name in NativeWeights(tmp_path / "native").shapes)
    save_file({**tensors, "model.layers.4.eh_proj.weight": torch.ones(2, 2)}, file, metadata={"format": "pt"})
    assert run_convert("from-hf", tmp_path / "hf", tmp_path / "other") == 2


@pytest.mark.parametrize(("family", "d_ff"), [("mixtral", None), ("qwen3_moe", 48)])
def test_a_config_takes_the_model_of_an_import(family: str, d_ff: int | None, tmp_path: Path) -> None:
    """A size of dense layers would be an error in a model without them."""
    build_hf_model(family).save_pretrained(tmp_path / "hf")
    assert make_cli_runner("convert")("from-hf", tmp_path / "hf", tmp_path / "native") == 0
    content = {
        "run": {"dir": "unused", "steps": 1},
        "model": {"from": str(tmp_path / "native")},
        "data": {"seq_len": 16, "global_batch": 1, "path": "unused"},
    }
    config, violations = load_config(content, [], read_model_section)
    assert violations == []
    assert config is not None
    assert list(check_effect(config)) == []
    assert config.model.d_ff == d_ff
