"""What only a GPU can show; run with `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.engines.native import NativeEngine
from dist_llm.observe.flops import peak_flops
from dist_llm.optim import clip
from dist_llm.train.step import train_step
from tests.laws.law import Spy, batches_of, config_of
from tests.laws.layouts import ADAMW, DOCUMENTS, MODELS, PREFIX

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
GPU = torch.device("cuda")


@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_takes_the_step_that_a_cpu_takes(model: str) -> None:
    """fp32, TF32 off: initial values bit-close, then loss, gradients and weights of three steps."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engines = [Spy(config_of(1, MODELS[model], optim=ADAMW), device) for device in (torch.device("cpu"), GPU)]
    for step in range(3):
        cpu, gpu = (train_step(each, batches_of(each.config, each, step), 1e-3, step) for each in engines)
        assert gpu.loss.item() == pytest.approx(cpu.loss.item(), rel=1e-5)
        assert gpu.grad_norm.item() == pytest.approx(cpu.grad_norm.item(), rel=1e-4)
    there = dict(engines[1].named_parameters())
    for name, parameter in engines[0].named_parameters():
        torch.testing.assert_close(there[name].cpu(), parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extra", [PREFIX, DOCUMENTS, {**PREFIX, **DOCUMENTS}], ids=["prefix", "documents", "both"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_block_masks_are_dense_ones(compiled: bool, extra: dict[str, Any]) -> None:
    """FlexAttention on the GPU, a dense mask on the CPU: heads of 16 dimensions, the least that it takes."""
    model = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2}
    cpu = Spy(config_of(1, model, optim=ADAMW, **extra), torch.device("cpu"))
    gpu = Spy(config_of(1, model, optim=ADAMW, compile=compiled, **extra), GPU)
    for step in range(2):
        want, found = (train_step(each, batches_of(each.config, each, step), 1e-3, step) for each in (cpu, gpu))
        assert found.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
        assert found.grad_norm.item() == pytest.approx(want.grad_norm.item(), rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_half_precision_trains(precision: str, compiled: bool) -> None:
    config = config_of(1, {}, optim={"name": "adamw", "lr": 3e-3, "clip": 1.0}, precision=precision, compile=compiled)
    engine = NativeEngine(config, GPU)
    losses = [train_step(engine, batches_of(config, engine, 0), 3e-3, s).loss.item() for s in range(20)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_makes_the_host_wait_for_nothing() -> None:
    config = config_of(1, {}, optim=ADAMW, precision="bf16")
    engine = NativeEngine(config, GPU)
    batches = [batch.pin() for batch in batches_of(config, engine, 0)]
    train_step(engine, batches, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(engine, batches, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_norm_is_exact_on_a_gpu() -> None:
    gradient = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    assert clip.norm([gradient.cuda()]).item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)


def test_the_peak_is_known_or_measured() -> None:
    flops, source = peak_flops(GPU, "bf16")
    assert flops > 1e13
    assert source


def test_the_debug_run_passes_on_a_gpu(tmp_path: Path) -> None:
    from dist_llm.cli import main

    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 2000)
    corpus = str(tmp_path / "corpus")
    assert (
        main(["prepare", "--source", str(text), "--tokenizer", "byte", "--out", corpus, "--heldout-fraction", "0"]) == 0
    )
    arguments = ["run.dir=unused", "run.steps=5", "model.d_model=64", "model.n_layers=2", "model.n_heads=2"]
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{path: {corpus}, seq_len: 64, global_batch: 4}}\noptim: {{lr: 0.003}}\n")
    assert main(["train", "--debug", str(config), *arguments]) == 0
