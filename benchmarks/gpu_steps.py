"""Step checks of `gpu.py`: training steps, generation and checkpoints on the device, compared with the CPU."""

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.compat import functional_collectives
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.generation import Prompt, Sampling, generate_tokens
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.build_model import build_model
from dist_llm.models.kv_cache import KVCache
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.fsdp import apply_fsdp
from dist_llm.parallel.mesh import build_mesh
from dist_llm.parallel.parallelize import init_parameters
from dist_llm.sharded import to_local
from dist_llm.training.step import train_step
from gpu_context import TINY_VOCAB_SIZE, CaseContext, Comparison, SkippedError, make_tiny_config

CPU = torch.device("cpu")
Steps = tuple[list[Tensor], dict[str, Tensor]]  # loss and gradient norm of each step; update of each parameter
# Checks compare updates, not weights. With these options an update of SGD is the gradient. The large epsilon keeps
# AdamW from amplifying rounding errors in gradients near zero.
SGD = ("optim.name=sgd", "optim.lr=1", "optim.momentum=0", "optim.clip=off", "optim.weight_decay=0")
ADAMW = ("optim.lr=0.01", "optim.eps=1e-3", "optim.clip=1")
MUON = (*ADAMW, "optim.name=muon")
EXPERTS = (
    "model.feedforward={name: moe, n_experts: 8, top_k: 2, d_expert: 64, balance_loss: 0.01, selection_bias: true}",
    "model.d_ff=null",
    "model.init_std=0.1",
)
NUM_STEPS = 3
# The error of a parameter update is relative to its largest element, but to at least this fraction of the largest
# update of all parameters.
MIN_RELATIVE_UPDATE = 1e-2
SYNC_MESSAGE = "called a synchronizing CUDA operation"


def make_batch(config: Config, step: int, attention_mask: AttentionMask = CAUSAL) -> Batch:
    """Make a batch of random ids, in which each sequence has another number of valid targets."""
    generator = torch.Generator().manual_seed(step)
    shape = (config.data.global_batch, config.data.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=generator)
    targets = ids[:, 1:].clone()
    for index in range(len(ids)):
        targets[index, : index * 5] = -100
    return Batch.build(ids[:, :-1].contiguous(), targets, attention_mask)


def take_steps(engine: NativeEngine, num_steps: int = NUM_STEPS, attention_mask: AttentionMask = CAUSAL) -> Steps:
    """Return (loss and gradient norm of each step, the update of each parameter over all steps)."""
    before = {name: to_local(parameter).detach().clone() for name, parameter in engine.named_parameters()}
    reports = [
        train_step(engine, [make_batch(engine.config, step, attention_mask)], engine.config.optim.lr, step)
        for step in range(num_steps)
    ]
    scalars = [value.detach() for report in reports for value in (report.loss, report.grad_norm)]
    updates = {name: to_local(parameter).detach() - before[name] for name, parameter in engine.named_parameters()}
    return scalars, updates


def compare_steps(
    comparison: Comparison,
    label: str,
    actual: Steps,
    expected: Steps,
    scalar_tolerance: float,
    update_tolerance: float,
) -> None:
    """Compare losses, gradient norms and updates.

    The error of an update is relative to its largest element; see MIN_RELATIVE_UPDATE.
    """
    for index, (actual_scalar, expected_scalar) in enumerate(zip(actual[0], expected[0], strict=True)):
        quantity = "grad_norm" if index % 2 else "loss"
        comparison.check_close(f"{label}: {quantity}", actual_scalar, expected_scalar, scalar_tolerance)
    if not comparison.context.has_values:
        return
    largest_update = max(update.abs().max().item() for update in expected[1].values())
    for name, update in expected[1].items():
        difference = (actual[1][name].cpu().double() - update.cpu().double()).abs().max().item()
        scale = max(update.abs().max().item(), MIN_RELATIVE_UPDATE * largest_update)
        comparison.check_at_most(f"{label}: updates", difference / scale, update_tolerance)


def check_step(context: CaseContext) -> dict[str, object]:
    """Check that three fp32 steps of two models with each optimizer agree with the CPU within 1e-4 (Muon: 1e-3)."""
    comparison = Comparison(context)
    for model in ("llama-cpu", "gpt2-cpu"):
        for name, overrides in (("sgd", SGD), ("adamw", ADAMW), ("muon", MUON)):
            config = make_tiny_config(*overrides, model=model)
            actual = take_steps(NativeEngine(config, context.device), NUM_STEPS if context.has_values else 1)
            expected = take_steps(NativeEngine(config, CPU)) if context.has_values else actual
            compare_steps(
                comparison,
                f"{model} {name}",
                actual,
                expected,
                scalar_tolerance=1e-4,
                update_tolerance=1e-3 if name == "muon" else 1e-4,
            )
    return comparison.make_result()


def check_experts(context: CaseContext) -> dict[str, object]:
    """Check that three fp32 steps of a mixture of experts agree with the CPU within 1e-4 (Muon: 1e-3)."""
    if not context.has_values:
        raise SkippedError("torch traces grouped matrix products in bf16 only")
    comparison = Comparison(context)
    for name, overrides in (("sgd", SGD), ("muon", MUON)):
        config = make_tiny_config(*overrides, *EXPERTS)
        actual = take_steps(NativeEngine(config, context.device))
        expected = take_steps(NativeEngine(config, CPU))
        update_tolerance = 1e-3 if name == "muon" else 1e-4
        compare_steps(comparison, name, actual, expected, scalar_tolerance=1e-4, update_tolerance=update_tolerance)
    return comparison.make_result()


def check_step_bf16(context: CaseContext) -> dict[str, object]:
    """Check that a bf16 step on the device is near an fp32 step on the CPU, but not equal to it.

    The loss must agree within 1%, the gradient norm within 5%, and the updates by a cosine similarity of 0.99.
    """
    comparison = Comparison(context)
    expected = take_steps(NativeEngine(make_tiny_config(*SGD), CPU), num_steps=1)
    actual = take_steps(NativeEngine(make_tiny_config(*SGD, "precision=bf16"), context.device), num_steps=1)
    comparison.check_close("loss", actual[0][0], expected[0][0], 1e-2)
    comparison.check_close("grad_norm", actual[0][1], expected[0][1], 5e-2)
    if context.has_values:
        cosine = min(_cosine_similarity(actual[1][name], update) for name, update in expected[1].items())
        comparison.check_at_most("updates: 1 - cosine", 1 - cosine, 1e-2)
        comparison.check_true("bf16 computed what fp32 computes", actual[0][0].item() != expected[0][0].item())
    return comparison.make_result()


def _cosine_similarity(actual: Tensor, expected: Tensor) -> float:
    """Return the cosine similarity of two tensors, computed in fp64."""
    actual, expected = actual.cpu().double().flatten(), expected.double().flatten()
    return nn.functional.cosine_similarity(actual, expected, dim=0).item()


def check_compile(context: CaseContext) -> dict[str, object]:
    """Check that steps of compiled blocks equal steps of eager blocks in fp32, also with selective recomputation."""
    comparison = Comparison(context)
    num_steps = NUM_STEPS if context.has_values else 1
    expected = take_steps(NativeEngine(make_tiny_config(*SGD), context.device), num_steps)
    for recompute in ("none", "selective"):
        config = make_tiny_config(*SGD, "compile=true", f"parallel.recompute={recompute}")
        actual = take_steps(NativeEngine(config, context.device), num_steps)
        label = f"recompute {recompute}"
        compare_steps(comparison, label, actual, expected, scalar_tolerance=1e-4, update_tolerance=1e-4)
    return comparison.make_result()


def check_fp8_step(context: CaseContext, compiled: bool) -> dict[str, object]:
    """Check that in ten steps on one batch the losses in float8 fall, and are within 2% of the losses in bf16."""
    comparison, num_steps = Comparison(context), 10 if context.has_values else 1
    losses = {}
    for fp8 in (True, False):
        config = make_tiny_config("precision=bf16", f"fp8={fp8}", f"compile={compiled}", "optim.lr=0.003")
        engine = NativeEngine(config, context.device)
        losses[fp8] = [
            train_step(engine, [make_batch(config, step=0)], lr=3e-3, step=step).loss for step in range(num_steps)
        ]
    fp8_losses, bf16_losses = losses[True], losses[False]
    comparison.check_close("loss of the first step", fp8_losses[0], bf16_losses[0], 1e-2)
    comparison.check_close("losses of ten steps", torch.stack(fp8_losses).sum(), torch.stack(bf16_losses).sum(), 2e-2)
    if context.has_values:
        comparison.check_true("the loss does not fall", fp8_losses[-1].item() < 0.98 * fp8_losses[0].item())
    return comparison.make_result()


def check_generation(context: CaseContext) -> dict[str, object]:
    """Check that the device generates the tokens of the CPU, with and without the KV cache; logits within 1e-4."""
    comparison = Comparison(context)
    config = make_tiny_config()
    model = build_model(config.model).eval()
    init_parameters(model, config)
    device_model = copy.deepcopy(model).to(context.device)
    ids = torch.arange(3, 20)[None]
    for name, cache in (("without a cache", None), ("with a cache", KVCache())):
        with torch.no_grad():
            logits = device_model(ids.to(context.device), mask=CAUSAL, cache=cache)
            if cache:  # continue the sequence with five more tokens
                logits = device_model(ids[:, :5].to(context.device), mask=CAUSAL, cache=cache)
            expected = model(torch.cat((ids, ids[:, :5]), 1) if cache else ids, mask=CAUSAL)
        comparison.check_close(f"logits {name}", logits[:, -1], expected[:, -1], 1e-4)
    if context.has_values:
        prompt, greedy = Prompt(list(range(3, 20))), Sampling(max_tokens=16, temperature=0.0)
        expected_ids = list(generate_tokens(model, prompt, greedy, max_seq_len=64))
        for use_cache in (True, False):
            label = f"tokens {'with' if use_cache else 'without'} a cache"
            actual_ids = list(generate_tokens(device_model, prompt, greedy, max_seq_len=64, use_cache=use_cache))
            comparison.check_equal(label, actual_ids, expected_ids)
    return comparison.make_result()


def check_checkpoint(context: CaseContext) -> dict[str, object]:
    """Check that a checkpoint of the device, loaded on the CPU, has the same bits and takes the same next step."""
    comparison = Comparison(context)
    config = make_tiny_config(*ADAMW)
    engine, cpu_engine = NativeEngine(config, context.device), NativeEngine(config, CPU)
    take_steps(engine, num_steps=2)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointStore(Path(folder))
        if not context.has_values:
            checkpoints.staging.copy(engine.state.weights() | engine.state.moments())
            return comparison.make_result()
        checkpoints.save(engine.state, Progress(step=2), {})
        checkpoints.finish()
        checkpoint = checkpoints.find_latest_verified()
        assert checkpoint is not None
        load_checkpoint(checkpoint, cpu_engine.state)
    state = engine.state.weights() | engine.state.moments()
    for name, tensor in (cpu_engine.state.weights() | cpu_engine.state.moments()).items():
        comparison.check_equal(name, state[name], tensor)
    actual, expected = take_steps(engine, num_steps=1), take_steps(cpu_engine, num_steps=1)
    compare_steps(comparison, "the next step", actual, expected, scalar_tolerance=1e-4, update_tolerance=1e-4)
    return comparison.make_result(tensors=len(state))


def check_one_rank(context: CaseContext) -> dict[str, object]:
    """Check that collectives work in a process group of one rank, and that a step with FSDP2 equals one without."""
    comparison = Comparison(context)
    config = make_tiny_config(*SGD)
    expected = take_steps(NativeEngine(config, context.device), num_steps=1)
    with context.process_group():
        x = torch.arange(8.0, device=context.device)
        for name, output in _run_collectives(x).items():
            comparison.check_equal(name, output, x)
        engine = NativeEngine(config, context.device)
        assert engine.mesh is not None
        with torch.device("meta"):
            model = build_model(config.model)
        apply_fsdp(model, config, build_mesh(config.parallel, context.device.type))
        model.to_empty(device=context.device)
        init_parameters(model, config)
        engine.model_parts, engine._named_parameters = [model], list(model.named_parameters())
        engine.optimizer = engine._build_optimizer()
        actual = take_steps(engine, num_steps=1)
        compare_steps(comparison, "FSDP2", actual, expected, scalar_tolerance=1e-5, update_tolerance=1e-5)
        del engine, model
    return comparison.make_result()


def _run_collectives(x: Tensor) -> dict[str, Tensor]:
    """Run each collective that layouts use on one rank, where it must return its input; return the outputs by name."""
    group, broadcast_result = dist.group.WORLD, x.clone()
    assert group is not None
    dist.broadcast(broadcast_result, 0)
    pending = {
        "all_reduce": functional_collectives.all_reduce(x, "sum", group.group_name),
        "all_gather": functional_collectives.all_gather_into_tensor(x, 1, group.group_name),
        "reduce_scatter": functional_collectives.reduce_scatter_tensor(x, "sum", 1, group.group_name),
    }
    return {
        "broadcast": broadcast_result,
        **{name: functional_collectives.wait_tensor(output) for name, output in pending.items()},
    }


def check_host_syncs(context: CaseContext, overrides: Sequence[str], documents: bool = False) -> dict[str, object]:
    """Check that a step never makes the host wait for the device; a fake GPU raises if a value is read."""
    if context.device_kind == "cpu":
        raise SkippedError("a CPU has no host syncs")
    comparison = Comparison(context)
    config = make_tiny_config("precision=bf16", *overrides)
    engine = NativeEngine(config, context.device)
    ids_BT = torch.arange(config.data.seq_len).expand(config.data.global_batch, -1) * 4 // config.data.seq_len
    attention_mask = AttentionMask(causal=True, documents_BT=ids_BT) if documents else CAUSAL
    batch = make_batch(config, step=0, attention_mask=attention_mask).pin_memory()
    for step in range(2):
        train_step(engine, [batch], lr=1e-3, step=step)
    with warnings.catch_warnings(record=True) as warning_messages:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(engine, [batch], lr=1e-3, step=2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [
        f"{warning.filename}:{warning.lineno}" for warning in warning_messages if SYNC_MESSAGE in str(warning.message)
    ]
    comparison.check_at_most("syncs of a step", len(lines), 0)
    return comparison.make_result(syncs=len(lines), lines=lines)


assert TINY_VOCAB_SIZE > 20, "the vocabulary is too small for `check_generation`, which uses token ids up to 19"
