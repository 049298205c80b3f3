"""Corpora and checkpoints of nanoGPT are converted in both directions with the same ids, logits and losses.

The model below reimplements the architecture of nanoGPT, and is the reference for logits and losses.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.checkpoint.checkpoint_state import TorchState
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.config.load import load_saved_config
from dist_llm.convert.nanogpt import build_nanogpt
from dist_llm.convert.weights import load_torch
from dist_llm.data.corpus import Corpus
from dist_llm.errors import CheckpointError, DataError
from dist_llm.launch.world import World
from dist_llm.models.build_model import build_model
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.text.export import export_bin
from dist_llm.training.evaluate_checkpoint import EvaluationOptions, evaluate_checkpoint
from tests.cli_runner import make_cli_runner

MODEL_ARGS = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 257}


class LayerNorm(nn.Module):
    """A layer norm with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    """Causal self-attention. `args` are the model_args of nanoGPT."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.num_heads = args["n_head"]
        self.c_attn = nn.Linear(args["n_embd"], 3 * args["n_embd"], bias=args["bias"])
        self.c_proj = nn.Linear(args["n_embd"], args["n_embd"], bias=args["bias"])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            tensor.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for tensor in self.c_attn(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention and MLP, each after a layer norm."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        width, bias = args["n_embd"], args["bias"]
        self.ln_1, self.attn, self.ln_2 = LayerNorm(width, bias), Attention(args), LayerNorm(width, bias)
        linears = {"c_fc": nn.Linear(width, 4 * width, bias=bias), "c_proj": nn.Linear(4 * width, width, bias=bias)}
        self.mlp = nn.ModuleDict(linears)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    """The model of nanoGPT, with the parameter names of nanoGPT."""

    def __init__(self, **args: Any) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(args["vocab_size"], args["n_embd"]),
                "wpe": nn.Embedding(args["block_size"], args["n_embd"]),
                "h": nn.ModuleList([Block(args) for _ in range(args["n_layer"])]),
                "ln_f": LayerNorm(args["n_embd"], args["bias"]),
            }
        )
        self.lm_head = nn.Linear(args["n_embd"], args["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[union-attr]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))

    def build_optimizer(self) -> torch.optim.AdamW:
        """Return the optimizer of configure_optimizers in nanoGPT: weight decay applies only to matrices."""
        parameters = list(self.parameters())
        groups = [
            {"params": [tensor for tensor in parameters if tensor.dim() >= 2], "weight_decay": 0.1},
            {"params": [tensor for tensor in parameters if tensor.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def build_nanogpt_model(bias: bool) -> GPT:
    """Build a model of nanoGPT with random weights, biases and norms."""
    torch.manual_seed(0)
    model = GPT(**MODEL_ARGS, bias=bias, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_nanogpt_checkpoint(model: GPT, bias: bool, file: Path) -> None:
    """Save a checkpoint as train.py of nanoGPT does with torch.compile.

    It includes the causal mask, which nanoGPT stores if it runs without flash attention.
    """
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    causal_mask = torch.ones(16, 16).tril()[None, None]
    tensors |= {f"_orig_mod.transformer.h.{layer}.attn.bias": causal_mask for layer in range(2)}
    content = {
        "model": tensors,
        "optimizer": model.build_optimizer().state_dict(),
        "model_args": {**MODEL_ARGS, "bias": bias, "dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"out_dir": "out", "learning_rate": 6e-4},
    }
    torch.save(content, file)


def write_bin_files(directory: Path) -> dict[str, np.ndarray]:
    """Write uint16 ids with id 256 after each document, as prepare.py of nanoGPT does. Return the ids by file name."""
    rng = np.random.default_rng(0)
    ids_by_file = {}
    for name, num_documents in (("train.bin", 20), ("val.bin", 5)):
        documents = [np.append(rng.integers(0, 256, rng.integers(10, 60)), 256) for _ in range(num_documents)]
        ids_by_file[name] = np.concatenate(documents).astype(np.uint16)
        ids_by_file[name].tofile(directory / name)
    return ids_by_file


def adopt_bin_files(directory: Path) -> Path:
    """Make a corpus of train.bin and val.bin; return its directory."""
    out = directory / "corpus"
    data, heldout = (str(directory / "train.bin"),), (str(directory / "val.bin"),)
    adopt(
        AdoptOptions(format="bin", data=data, tokenizer="byte", out=out, heldout=heldout, dtype="uint16"), io.StringIO()
    )
    return out


@pytest.mark.parametrize("bias", [True, False])
def test_a_round_trip_keeps_weights_losses_and_corpus(
    bias: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_convert = make_cli_runner("convert")
    nanogpt_model, ids_by_file = build_nanogpt_model(bias=bias), write_bin_files(tmp_path)
    corpus = adopt_bin_files(tmp_path)
    save_nanogpt_checkpoint(nanogpt_model, bias=bias, file=tmp_path / "ckpt.pt")
    assert run_convert("from-nanogpt", tmp_path / "ckpt.pt", tmp_path / "native", "--tokenizer", corpus) == 0

    config = load_saved_config(tmp_path / "native")
    native = build_model(config.model).eval()
    load_checkpoint(tmp_path / "native", TorchState(native), with_moments=False)
    ids = torch.randint(257, (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(native(ids), nanogpt_model(ids), rtol=1e-5, atol=1e-5)

    # The held-out loss of val.bin in the windows that nanoGPT would use.
    result = evaluate_checkpoint(
        str(tmp_path / "native"), data=str(corpus), split="heldout", options=EvaluationOptions(), world=World()
    )
    tokens = torch.from_numpy(ids_by_file["val.bin"].astype(np.int64))
    losses = [
        F.cross_entropy(nanogpt_model(tokens[None, start : start + 16][:, : len(tokens) - 1 - start])[0],
                        tokens[start + 1 : start + 17], reduction="sum")
        for start in range(0, len(tokens) - 1, 16)
    ]  # fmt: skip
    assert result.tokens == len(tokens) - 1
    assert result.loss == pytest.approx(float(torch.stack(losses).sum().detach()) / result.tokens, rel=1e-5)
    assert "in windows of 16 (data.seq_len of the checkpoint): " in capsys.readouterr().out

    assert run_convert("to-nanogpt", tmp_path / "native", tmp_path / "back.pt") == 0
    exported = torch.load(tmp_path / "back.pt", weights_only=True)
    original = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert exported.keys() == original.keys()
    assert exported["model_args"] == original["model_args"]
    nanogpt_copy = GPT(**exported["model_args"])
    nanogpt_copy.load_state_dict(exported["model"])  # strict
    assert list(exported["model"]) == list(nanogpt_copy.state_dict()), "the tensors must be in the order of nanoGPT"
    for name, tensor in nanogpt_model.state_dict().items():
        assert torch.equal(exported["model"][name], tensor), name
    optimizer = nanogpt_copy.build_optimizer()
    optimizer.load_state_dict(exported["optimizer"])
    F.cross_entropy(nanogpt_copy(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()

    assert export_bin(corpus, tmp_path / "bins") == {name: len(ids) for name, ids in ids_by_file.items()}
    for name in ids_by_file:
        assert (tmp_path / "bins" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_model_that_nanogpt_cannot_express_is_refused(tmp_path: Path) -> None:
    run_convert = make_cli_runner("convert")
    save_nanogpt_checkpoint(build_nanogpt_model(bias=True), bias=True, file=tmp_path / "ckpt.pt")
    assert run_convert("from-nanogpt", tmp_path / "ckpt.pt", tmp_path / "native") == 0
    config, weights = load_saved_config(tmp_path / "native"), None
    for changed_keys in ({"activation": "gelu_tanh"}, {"tie_embeddings": False}, {"d_ff": 64}, {"positions": "rope"}):
        changed_config = config.model_copy(update={"model": config.model.model_copy(update=changed_keys)})
        with pytest.raises(
            CheckpointError, match=f"nanoGPT does not support this model: it has .*{next(iter(changed_keys))}"
        ):
            build_nanogpt(weights, changed_config)  # type: ignore[arg-type]
    content = load_torch(tmp_path / "ckpt.pt")
    content["model_args"]["n_head"] = 5
    torch.save(content, tmp_path / "odd.pt")
    assert run_convert("from-nanogpt", tmp_path / "odd.pt", tmp_path / "odd") == 2


def test_a_corpus_with_too_many_ids_is_not_exported(tmp_path: Path) -> None:
    write_bin_files(tmp_path)
    corpus = adopt_bin_files(tmp_path)
    path = corpus / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100_000}))
    with pytest.raises(DataError, match=r"has 100000 ids, but nanoGPT's \.bin files hold at most 65536"):
        export_bin(corpus, tmp_path / "bins")
    assert not (tmp_path / "bins").exists()
    assert Corpus(corpus).num_tokens
