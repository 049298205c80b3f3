"""Conversion to Hugging Face and back preserves weights, logits and tokens.

Models without an equivalent are refused.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import TorchState
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.checkpoint.manifest import verify_checkpoint
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.config.compare import get_function_keys
from dist_llm.config.load import dump_config, load_config
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.convert import hf_import
from dist_llm.convert.hf_config import WRITERS, build_hf_config, parse_hf_config
from dist_llm.convert.native_shapes import list_native_shapes
from dist_llm.convert.weights import DictWeights, LazyWeights, SafetensorsWeights
from dist_llm.convert.write_weights import verify_written, write_atomically, write_native, write_safetensors
from dist_llm.errors import CheckpointError
from dist_llm.generation import Sampling, encode_prompt, generate_tokens, load_model
from dist_llm.models.build_model import build_model
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.tokenizer import ENDOFTEXT
from tests.cli_runner import make_cli_runner
from tests.convert.families import FAMILIES, build_hf_model
from tests.laws.layouts import BART, BERT

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
CAUSAL = [family for family in FAMILIES if family not in ("bert", "t5", "bart")]


@pytest.fixture(scope="module")
def run_convert() -> Callable[..., int]:
    """Return a function that runs `dist-llm convert` in this process and returns the exit code."""
    return make_cli_runner("convert")


def save_hf_model(family: str, directory: Path) -> Any:
    """Write a small Hugging Face model with random weights; return it."""
    hf_model = build_hf_model(family)
    hf_model.save_pretrained(directory)
    return hf_model


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder of safetensors files."""
    weights = SafetensorsWeights(directory)
    return {name: weights.read(name) for name in weights.shapes}


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_gives_the_same_bits(
    family: str, run_convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` compares logits in fp32 and distributions in fp64 in both directions."""
    save_hf_model(family, tmp_path / "hf_model")
    assert run_convert("from-hf", tmp_path / "hf_model", tmp_path / "native", "--check") == 0
    assert run_convert("to-hf", tmp_path / "native", tmp_path / "round_trip", "--family", family, "--check") == 0
    assert capsys.readouterr().out.count("logits differ by") == 2
    verify_checkpoint(CheckpointFolder(tmp_path / "native"))
    before, after = read_tensors(tmp_path / "hf_model"), read_tensors(tmp_path / "round_trip")
    # Tensors that are always zero, or copies of another tensor, are not written.
    assert after.keys() <= before.keys()
    for name, tensor in before.items():
        if name in after:
            assert torch.equal(after[name], tensor), name
        else:
            assert not tensor.any() or any(torch.equal(tensor, other) for other in after.values()), name


NATIVE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2},
    "qwen2": {"n_kv_heads": 2, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": {"n_kv_heads": 1, "qk_norm": True, "head_dim": 16},
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "bias": True,
        "activation": "gelu_tanh",
        "tie_embeddings": True,
    },
    "t5": {
        "architecture": "encoder_decoder",
        "n_encoder_layers": 2,
        "positions": "relative",
        "activation": "geglu_tanh",
        "attention_scale": 1.0,
    },
    "bart": {**BART, "n_encoder_layers": 2, "n_kv_heads": 4},
}


def weight_scale(name: str, ndim: int) -> float:
    """Return a scale that is small enough for embeddings that a model does not only repeat its last token."""
    return 0.1 if ndim == 1 or "tokens" in name else 0.5


def write_native_checkpoint(directory: Path, changes: dict[str, Any]) -> Path:
    """Write a checkpoint with random weights, a byte tokenizer, and a vocabulary padded to 320 rows."""
    tokenizer = BPETokenizer(
        "byte", SPLIT_PATTERNS["gpt2"], {bytes([byte]): byte for byte in range(256)}, {ENDOFTEXT: 256}
    )
    is_encoder_decoder = changes.get("architecture") == "encoder_decoder"
    vocab_size = ObjectiveVocabulary(257, 256).sentinel_id(8) if is_encoder_decoder else 257
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "d_ff": 48}
    config = Config.model_validate(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {**sizes, "vocab_size": vocab_size, "max_seq_len": 64, "init_std": 0.4, **changes},
            "data": {"seq_len": 64, "global_batch": 1, "micro_batch": 1},
            "objective": {"name": "span" if is_encoder_decoder else "causal"},
        }
    )
    model = build_model(config.model)
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"model.{name}": torch.randn(parameter.shape, generator=generator) * weight_scale(name, parameter.ndim)
        + ("norm" in name and name.endswith("weight"))
        for name, parameter in model.named_parameters()
    }
    progress = json.dumps({"step": 0, "samples": 0, "tokens": 0}).encode()
    files = {
        "config.yaml": dump_config(config).encode(),
        "tokenizer.json": tokenizer.to_json_bytes(),
        "progress.json": progress,
    }
    write_native(directory, DictWeights(weights), files)
    return directory


def test_encoder_round_trip(run_convert: Callable[..., int], tmp_path: Path) -> None:
    native = write_native_checkpoint(tmp_path / "native", {**BERT, "n_kv_heads": 4})
    assert run_convert("to-hf", native, tmp_path / "hf_model", "--check") == 0
    assert run_convert("from-hf", tmp_path / "hf_model", tmp_path / "round_trip", "--check") == 0
    first, reimported = NativeWeights(native), NativeWeights(tmp_path / "round_trip")
    for name in first.shapes:
        rows = slice(257) if name in ("model.embed.tokens.weight", "model.head.bias") else slice(None)
        assert torch.equal(first.read(name)[rows], reimported.read(name)[rows]), name


def test_token_ids_survive_a_round_trip(run_convert: Callable[..., int], tmp_path: Path) -> None:
    hf_model = save_hf_model("t5", tmp_path / "hf_model")
    assert hf_model.config.decoder_start_token_id == 1
    assert run_convert("from-hf", tmp_path / "hf_model", tmp_path / "native") == 0
    assert run_convert("to-hf", tmp_path / "native", tmp_path / "round_trip") == 0
    actual = json.loads((tmp_path / "round_trip" / "generation_config.json").read_text())
    assert [actual[key] for key in hf_import.TOKEN_ID_KEYS] == [1, 2, 0, 1]


@pytest.mark.parametrize("family", NATIVE_MODELS)
def test_transformers_generates_the_same_tokens_from_an_export(
    family: str, run_convert: Callable[..., int], tmp_path: Path
) -> None:
    native = write_native_checkpoint(tmp_path / "native", NATIVE_MODELS[family])
    assert run_convert("to-hf", native, tmp_path / "hf_model", "--check") == 0
    assert json.loads((tmp_path / "hf_model" / "config.json").read_text())["model_type"] == family
    is_encoder_decoder = family in ("t5", "bart")
    loader = transformers.AutoModelForSeq2SeqLM if is_encoder_decoder else transformers.AutoModelForCausalLM
    hf_model = loader.from_pretrained(tmp_path / "hf_model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf_model")

    model, our_tokenizer, config = load_model(native, torch.device("cpu"))
    tokens_seen: set[int] = set()
    for prompt in ("def f(x):", "import", "#", "class A: pass"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0].tolist() == our_tokenizer.encode(prompt).tolist()
        inputs = encode_prompt(config, our_tokenizer, prompt)
        if is_encoder_decoder:
            ids = torch.tensor([inputs.encoder_ids])
        start = {"decoder_input_ids": torch.tensor([inputs.ids])} if is_encoder_decoder else {}
        actual = hf_model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=[], **start)[0]
        native_ids = list(generate_tokens(model, inputs, Sampling(max_tokens=20, temperature=0), 64))
        assert actual[-20:].tolist() == native_ids
        assert (
            tokenizer.decode(actual[-20:], skip_special_tokens=False) == our_tokenizer.decode(native_ids)
            or is_encoder_decoder
        )
        tokens_seen.update(native_ids)
    assert len(tokens_seen) >= 3, "the model must generate at least three different tokens"


def test_missing_rotary_permutation_is_detected(
    run_convert: Callable[..., int], tmp_path: Path, monkeypatch: Any
) -> None:
    """With queries in Meta's pairing of rotary dimensions the bits match but the logits do not."""
    save_hf_model("llama", tmp_path / "hf_model")
    original = hf_import.to_native

    def permute_queries(pair: Any, hf_tensors: Any) -> Tensor:
        tensor = original(pair, hf_tensors)
        if pair.native_name.endswith("attention.q.weight"):
            return tensor.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        return tensor

    monkeypatch.setattr(hf_import, "to_native", permute_queries)
    assert run_convert("from-hf", tmp_path / "hf_model", tmp_path / "native", "--check") == 2
    assert not (tmp_path / "native").exists(), "a wrong output must be removed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf_model"]


def test_weights_are_written_in_half_precision_and_several_files(
    run_convert: Callable[..., int], tmp_path: Path
) -> None:
    native = write_native_checkpoint(tmp_path / "native", NATIVE_MODELS["llama"])
    arguments = ("--dtype", "bf16", "--shard-gb", "1e-5", "--check")
    assert run_convert("to-hf", native, tmp_path / "hf_model", *arguments) == 0
    assert len(list((tmp_path / "hf_model").glob("*.safetensors"))) > 3
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf_model")
    assert hf_model.dtype == torch.bfloat16
    with torch.no_grad():
        hf_model.lm_head.weight[3].zero_()
    assert run_convert("from-hf", tmp_path / "hf_model", tmp_path / "round_trip") == 0
    first, reimported = NativeWeights(native), NativeWeights(tmp_path / "round_trip")
    for name, shape in reimported.shapes.items():
        assert first.shapes[name] == shape, "the vocabulary must be padded again"
        rows = slice(257) if name in ("model.embed.tokens.weight", "model.head.out.weight") else slice(None)
        assert torch.equal(first.read(name).bfloat16().float()[rows], reimported.read(name)[rows]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_cap": 30.0}, "logit_cap 30.0"),
        ({"positions": "sinusoidal"}, "positions sinusoidal"),
        ({"residual_scale": 0.5, "qk_norm": True}, "residual_scale 0.5"),
        ({"parametrization": {"name": "mup", "base_d_model": 8}}, "parametrization {'name': 'mup'"),
        ({"attention_scale": 0.3, "attention_cap": 20.0}, "attention_cap 20.0"),
        ({"attention_sinks": True}, "attention_sinks True"),
        ({"output_gate": "per_head"}, "output_gate per_head"),
        ({"layers": ("a", "b"), "kinds": {"a": {"n_heads": 8}, "b": {}}}, r"n_heads \[8, 4\]"),
        (
            {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu", "head_dim": 9},
            "head_dim 9",
        ),
    ],
    ids=str,
)
def test_model_without_a_hugging_face_equivalent_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"no equivalent.*{message}"):
        build_hf_config(make_model_config(changes))


def test_a_family_that_refuses_the_model_says_why() -> None:
    """T5 v1.1 has no tied embeddings."""
    tied = {**NATIVE_MODELS["t5"], "tie_embeddings": True}
    with pytest.raises(CheckpointError, match=r"no equivalent.*t5 refuses it: .*only T5 v1\.1 is supported"):
        build_hf_config(make_model_config(tied), "t5")


def make_model_config(changes: dict[str, Any]) -> ModelConfig:
    """Return the config of a tiny native model with changed keys."""
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "head_dim": 8, "d_ff": 48}
    return ModelConfig.model_validate({**sizes, "vocab_size": 64, "max_seq_len": 32, **changes})


# The small models of these families are also models of a family that comes first in the table.
SIMPLER_FAMILIES = {"mistral": "llama", "phi3": "mistral", "glm": "qwen2", "opt": "gpt2"}


@pytest.mark.parametrize("family", WRITERS)
def test_every_family_is_detected_from_its_config(family: str) -> None:
    config = parse_hf_config(build_hf_model(family).config.to_dict())
    exported = build_hf_config(config, family)
    assert exported["model_type"] == family
    assert get_function_keys(parse_hf_config(exported)) == get_function_keys(config)
    # Without a family, the first one is chosen that can express the model.
    detected = build_hf_config(config)
    assert detected["model_type"] in (family, SIMPLER_FAMILIES.get(family))
    assert get_function_keys(parse_hf_config(detected)) == get_function_keys(config)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None},
            r"model\.rope_scaling\.llama3\.factor cannot be derived: field required",
        ),
        ("llama", {"rope_scaling": {"rope_type": "su"}, "rope_parameters": None}, "rope_type su is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "x": 1}}, "x 1 of rope"),
        ("llama", {"hidden_act": "mish"}, "activation mish is not supported"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types chunked_attention is not supported"),
        ("gemma2", {"sliding_window": None}, "sliding_window is not set"),
        ("falcon", {"alibi": True}, "alibi True"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False"),
        ("bart", {"encoder_attention_heads": 2}, "must be equal"),
        ("t5", {"feed_forward_proj": "relu"}, "only T5 v1.1"),
        ("gpt2", {"model_type": "mamba"}, "model_type mamba is not supported"),
    ],
)
def test_unsupported_config_fields_are_refused(
    family: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_hf_model(family, tmp_path)
    hf_config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(hf_config))
    with pytest.raises(CheckpointError, match=message):
        hf_import.read_hf_config(tmp_path)


def test_unmapped_or_missing_tensors_are_refused(run_convert: Callable[..., int], tmp_path: Path) -> None:
    save_hf_model("llama", tmp_path / "hf_model")
    file = tmp_path / "hf_model" / "model.safetensors"
    full = load_file(file)
    for name, tensors in {
        "extra": {**full, "model.layers.0.mlp.extra.weight": torch.ones(2, 2)},
        "missing": {name: tensor for name, tensor in full.items() if "layers.1.mlp.up" not in name},
        "cut": {**full, "model.norm.weight": full["model.norm.weight"][:-1].clone()},
    }.items():
        changed = shutil.copytree(tmp_path / "hf_model", tmp_path / name)
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        assert run_convert("from-hf", changed, tmp_path / "native") == 2, name
        assert not (tmp_path / "native").exists()


def test_existing_output_is_never_overwritten(run_convert: Callable[..., int], tmp_path: Path) -> None:
    native = write_native_checkpoint(tmp_path / "native", NATIVE_MODELS["llama"])
    (tmp_path / "hf_model").mkdir()
    (tmp_path / "hf_model" / "precious").write_text("mine")
    assert run_convert("to-hf", native, tmp_path / "hf_model") == 2
    assert [path.name for path in (tmp_path / "hf_model").iterdir()] == ["precious"]


def test_verification_detects_wrong_output(tmp_path: Path) -> None:
    weights = DictWeights({"a": torch.randn(3, 2), "b": torch.randn(4)})
    with write_atomically(tmp_path / "out") as aside:
        aside.mkdir()
        write_safetensors(aside, weights)
    verify_written(SafetensorsWeights(tmp_path / "out"), weights, torch.float32)
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="b: the written values differ from the source"):
        verify_written(SafetensorsWeights(tmp_path / "out"), weights, torch.float32)
    for values, message in ((torch.full((3, 2), torch.nan), "not finite"), (torch.zeros(3, 2), "all zero")):
        invalid_weights = DictWeights({"a": values, "b": torch.randn(4)})
        with pytest.raises(CheckpointError, match=message):
            verify_written(invalid_weights, invalid_weights, torch.float32)


NANOGPT = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 61, "dropout": 0.0}


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_gives_the_logits_of_gpt2(
    bias: bool, run_convert: Callable[..., int], tmp_path: Path
) -> None:
    """nanoGPT's tensors are GPT-2's, not transposed; a Hugging Face GPT-2 with exact GELU is the reference."""
    sizes = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_positions": 16,
        "vocab_size": 61,
        "activation_function": "gelu",
    }
    hf_model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            if not bias and name.endswith("bias"):
                parameter.zero_()
    tensors = {
        f"_orig_mod.{name}": tensor.t() if name.endswith(transposed) else tensor
        for name, tensor in hf_model.state_dict().items()
        if bias or not name.endswith(".bias")
    }
    mask = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    tensors |= {f"_orig_mod.transformer.h.{layer}.attn.bias": mask for layer in range(2)}
    file = tmp_path / "ckpt.pt"
    content = {"model": tensors, "model_args": {**NANOGPT, "bias": bias}, "iter_num": 7, "config": {"out_dir": "out"}}
    torch.save(content, file)
    assert run_convert("from-nanogpt", file, tmp_path / "native") == 0

    model, config = load_native_model(tmp_path / "native")
    assert config.model.bias == bias
    ids = torch.randint(61, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf_model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


class NativeModel(NamedTuple):
    """The model and the config of one of our checkpoints."""

    model: Any
    config: Config


def load_native_model(path: Path) -> NativeModel:
    """Load a checkpoint, which needs no tokenizer."""
    config, violations = load_config(path / "config.yaml")
    assert not violations
    assert config is not None
    model = build_model(config.model).eval()
    load_checkpoint(path, TorchState(model), with_moments=False)
    return NativeModel(model, config)


def test_torch_file_round_trip(run_convert: Callable[..., int], tmp_path: Path) -> None:
    native = write_native_checkpoint(tmp_path / "native", NATIVE_MODELS["t5"])
    assert run_convert("to-torch", native, tmp_path / "native.pt") == 0
    content = torch.load(tmp_path / "native.pt", weights_only=True)
    model = load_native_model(native).model
    model.load_state_dict(content["model"], strict=False)
    assert run_convert("from-torch", tmp_path / "native.pt", tmp_path / "round_trip") == 0
    assert run_convert("diff", native, tmp_path / "round_trip") == 0
    assert run_convert("diff", native, tmp_path / "native.pt") == 0
    for name in ("config.yaml", "tokenizer.json", "progress.json"):
        assert (tmp_path / "round_trip" / name).read_bytes() == (native / name).read_bytes()
    (tmp_path / "truncated.pt").write_bytes((tmp_path / "native.pt").read_bytes()[:1000])
    assert run_convert("from-torch", tmp_path / "truncated.pt", tmp_path / "refused") == 2


def test_checkpoints_are_averaged_compared_and_inspected(
    run_convert: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        write_native_checkpoint(tmp_path / "1", NATIVE_MODELS["llama"]),
        write_native_checkpoint(tmp_path / "2", NATIVE_MODELS["llama"]),
    )
    weights = NativeWeights(first)
    doubled = {name: weights.read(name) * 2 for name in weights.shapes}
    shutil.rmtree(second)
    files = {file.name: file.read_bytes() for file in first.iterdir() if file.suffix in (".json", ".yaml")}
    write_native(
        second, DictWeights(doubled), {name: tensor for name, tensor in files.items() if name != "manifest.json"}
    )
    assert run_convert("average", tmp_path / "mean", first, second) == 0
    mean = NativeWeights(tmp_path / "mean")
    for name in weights.shapes:
        torch.testing.assert_close(mean.read(name), weights.read(name) * 1.5)
    assert run_convert("diff", first, second) == 1
    out = capsys.readouterr().out
    assert f"{len(weights.shapes)} of {len(weights.shapes)} tensors differ" in out
    assert "1.000e+00" in out, "the difference must be relative to the norm of each tensor"

    other = write_native_checkpoint(tmp_path / "3", NATIVE_MODELS["llama"] | {"rope_theta": 5e5})
    assert run_convert("average", tmp_path / "other", first, other) == 2, (
        "models of equal shapes but different functions are averaged"
    )
    assert "model.rope_theta 500000.0, 10000.0" in capsys.readouterr().err

    assert run_convert("inspect", first) == 0
    out = capsys.readouterr().out
    total = sum(weights.read(name).numel() for name in weights.shapes)
    assert f"{len(weights.shapes)} tensors, {total:,} elements, 0 of them not finite" in out
    assert run_convert("verify", first) == 0
    next(first.glob("*.distcp")).write_bytes(b"")
    assert run_convert("verify", first) == 2
    infinite_weights = {name: tensor.fill_(torch.inf) for name, tensor in doubled.items()}
    write_native(tmp_path / "broken", DictWeights(infinite_weights), {})
    assert run_convert("inspect", tmp_path / "broken") == 2


@pytest.mark.parametrize(
    "options", [("--stage", 1), ("--stage", 2, "--world", 3), ("--stage", 3), ("--universal",)], ids=str
)
def test_deepspeed_round_trip(options: tuple[Any, ...], run_convert: Callable[..., int], tmp_path: Path) -> None:
    """test_deepspeed.py tests that DeepSpeed loads the output."""
    native = write_native_checkpoint(tmp_path / "native", NATIVE_MODELS["t5"])
    assert run_convert("to-deepspeed", native, tmp_path / "ds", *options) == 0
    assert run_convert("from-deepspeed", tmp_path / "ds", tmp_path / "round_trip", "--like", native) == 0
    assert run_convert("diff", native, tmp_path / "round_trip") == 0
    other = write_native_checkpoint(tmp_path / "other", NATIVE_MODELS["bart"])
    assert run_convert("from-deepspeed", tmp_path / "ds", tmp_path / "refused", "--like", other) == 2


LARGE_MODEL_SCRIPT = """
import json, resource, sys
from pathlib import Path
import torch
from dist_llm.cli import main
code = main(["convert", *sys.argv[1:]])
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps([code, peak]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_conversion_of_two_gigabytes_needs_little_memory(tmp_path: Path) -> None:
    """In both directions, in separate processes, peak memory is below 1.2 GB."""
    sizes = {"d_model": 2048, "n_layers": 8, "n_heads": 16, "n_kv_heads": 16, "head_dim": 128, "d_ff": 5632}
    model = make_model_config({**sizes, "vocab_size": 32000})
    config = Config.model_validate(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": model.model_dump(),
            "data": {"seq_len": 32, "global_batch": 1, "micro_batch": 1},
        }
    )
    shapes = list_native_shapes(model)
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert size > 2e9
    weights = LazyWeights(
        {f"model.{name}": shape for name, shape in shapes.items()}, lambda name: torch.randn(shapes[name[6:]])
    )
    files = {"config.yaml": dump_config(config).encode(), "progress.json": b'{"step": 0}'}
    write_native(tmp_path / "native", weights, files)
    for arguments in (
        ("to-hf", tmp_path / "native", tmp_path / "hf_model"),
        ("from-hf", tmp_path / "hf_model", tmp_path / "round_trip"),
    ):
        completed = subprocess.run(
            [sys.executable, "-c", LARGE_MODEL_SCRIPT, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        code, peak = json.loads(completed.stdout.splitlines()[-1])
        assert code == 0, completed.stderr
        assert peak < 1.2e9, arguments[0]
