"""On a GPU, training steps, kernels and float8 compute what the CPU computes; run with `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.engines.native import NativeEngine
from dist_llm.observe.flops import find_peak_flops
from dist_llm.optim import gradient_clipping
from dist_llm.parallel import fp8
from dist_llm.training.step import train_step
from tests.laws.law import RecordingEngine, make_batches, make_config
from tests.laws.layouts import ADAMW, DOCUMENTS, MODELS, PREFIX

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
GPU = torch.device("cuda")


@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_takes_the_step_that_a_cpu_takes(model: str) -> None:
    """Compare loss, gradient norm and weights of three steps in fp32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    engines = [
        RecordingEngine(make_config(ranks=1, model=MODELS[model], optim=ADAMW), device)
        for device in (torch.device("cpu"), GPU)
    ]
    for step in range(3):
        cpu_report, gpu_report = (
            train_step(engine, make_batches(engine.config, engine, step), lr=1e-3, step=step) for engine in engines
        )
        assert gpu_report.loss.item() == pytest.approx(cpu_report.loss.item(), rel=1e-5)
        assert gpu_report.grad_norm.item() == pytest.approx(cpu_report.grad_norm.item(), rel=1e-4)
    gpu_params = dict(engines[1].named_parameters())
    for name, parameter in engines[0].named_parameters():
        torch.testing.assert_close(gpu_params[name].cpu(), parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sections", [PREFIX, DOCUMENTS, {**PREFIX, **DOCUMENTS}], ids=["prefix", "documents", "both"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_block_masks_equal_dense_masks(compiled: bool, sections: dict[str, Any]) -> None:
    """FlexAttention on the GPU equals a dense mask on the CPU. It needs heads of 16 dimensions or more."""
    model = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2}
    cpu = RecordingEngine(make_config(ranks=1, model=model, optim=ADAMW, **sections), torch.device("cpu"))
    gpu = RecordingEngine(make_config(ranks=1, model=model, optim=ADAMW, compile=compiled, **sections), GPU)
    for step in range(2):
        expected, actual = (
            train_step(engine, make_batches(engine.config, engine, step), lr=1e-3, step=step) for engine in (cpu, gpu)
        )
        assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
        assert actual.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_half_precision_trains(precision: str, compiled: bool) -> None:
    config = make_config(
        ranks=1, optim={"name": "adamw", "lr": 3e-3, "clip": 1.0}, precision=precision, compile=compiled
    )
    engine = NativeEngine(config, GPU)
    losses = [
        train_step(engine, make_batches(config, engine, step=0), lr=3e-3, step=step).loss.item() for step in range(20)
    ]
    assert losses[-1] < 0.8 * losses[0]


def test_a_step_does_not_make_the_host_wait_for_the_gpu() -> None:
    config = make_config(ranks=1, optim=ADAMW, precision="bf16")
    engine = NativeEngine(config, GPU)
    batches = [batch.pin_memory() for batch in make_batches(config, engine, step=0)]
    train_step(engine, batches, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(engine, batches, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


has_float8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no products in float8 here"
)


@has_float8
@pytest.mark.parametrize("tokens", [4096, 21])  # 21 are padded to 32
def test_products_in_float8_equal_the_emulation(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and both gradients take one kernel call each and match the emulation.

    The tolerance is one bf16 rounding (2^-8) plus 2^-11 of the sum of absolute summands: on Hopper the sums of the
    kernel temporarily keep 13 bits below the largest summand.
    """
    shapes_and_stds = (((tokens, 768), 1e-2), ((2048, 768), 2e-2), ((tokens, 2048), 1e-5))
    x, w, g = ((std * torch.randn(shape, device=GPU)).bfloat16() for shape, std in shapes_and_stds)
    kernel, calls = torch._scaled_mm, []

    def count_call(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(arguments[0].dtype)
        return kernel(*arguments, **options)

    def compute_products() -> list[torch.Tensor]:
        inputs, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        y = fp8.float8_linear(inputs, weight)
        return [y.detach(), *torch.autograd.grad(y, (inputs, weight), g)]

    monkeypatch.setattr(torch, "_scaled_mm", count_call)
    actual = compute_products()
    assert calls == [fp8.INPUT_DTYPE, fp8.GRAD_DTYPE, fp8.GRAD_DTYPE]
    monkeypatch.setattr(fp8, "scaled_matmul", fp8.emulate_scaled_matmul)
    expected = compute_products()
    assert len(calls) == 3
    absolute_sums = [x.abs() @ w.abs().t(), g.abs() @ w.abs(), g.abs().t() @ x.abs()]
    for product, emulated, absolute_sum in zip(actual, expected, absolute_sums, strict=True):
        assert product.any()
        allowed = 2.0**-8 * emulated.float().abs() + 2.0**-11 * absolute_sum.float()
        assert ((product - emulated).float().abs() <= allowed).all()


@has_float8
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpu_trains_in_float8_as_a_cpu_emulates_it(compiled: bool) -> None:
    """Losses of 20 steps on one batch agree within 6%, and their sums within 1%, like those of float8 and bf16."""
    sections: dict[str, Any] = {"optim": {"name": "adamw", "lr": 3e-3, "clip": 1.0}, "precision": "bf16", "fp8": True}
    cpu = NativeEngine(make_config(ranks=1, **sections), torch.device("cpu"))
    gpu = NativeEngine(make_config(ranks=1, compile=compiled, **sections), GPU)
    expected, actual = (
        [
            train_step(engine, make_batches(engine.config, engine, step=0), lr=3e-3, step=step).loss.item()
            for step in range(20)
        ]
        for engine in (cpu, gpu)
    )
    assert actual[-1] < 0.8 * actual[0]
    assert actual == pytest.approx(expected, rel=0.06)
    assert sum(actual) == pytest.approx(sum(expected), rel=0.01)


@has_float8
def test_float8_scales_do_not_make_the_host_wait_for_the_gpu() -> None:
    x, w = torch.randn(64, 64, device=GPU, requires_grad=True), torch.randn(64, 64, device=GPU, requires_grad=True)
    fp8.float8_linear(x, w).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fp8.float8_linear(x, w).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_gradient_norm_on_a_gpu_agrees_with_fp64() -> None:
    gradient = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    assert gradient_clipping.compute_global_norm([gradient.cuda()]).item() == pytest.approx(
        gradient.double().norm().item(), rel=1e-6
    )


def test_the_peak_rate_is_known_or_measured() -> None:
    flops_per_second, source = find_peak_flops(GPU, "bf16")
    assert flops_per_second > 1e13
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
