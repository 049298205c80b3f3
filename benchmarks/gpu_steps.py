"""Step checks of `gpu.py`: the engine's steps on the device, compared with those on the CPU."""

import copy
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_llm.checkpoint import store
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.compat import functional_collectives
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.generation import Prompt, Sampling, generate_tokens
from dist_llm.models.attention import KVCache
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.build_model import build_model
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.fsdp import apply_fsdp
from dist_llm.parallel.mesh import build_mesh
from dist_llm.parallel.parallelize import init_parameters
from dist_llm.sharded import to_local
from dist_llm.training.step import train_step
from gpu_context import SMALL_VOCABULARY, Comparison, Context, SkippedError, small_config

CPU = torch.device("cpu")
# Checks compare updates, not weights: an update of SGD is the gradient. A large epsilon prevents that AdamW's update of
# an element near zero depends on the sign of a rounding error.
SGD = ("optim.name=sgd", "optim.lr=1", "optim.momentum=0", "optim.clip=0", "optim.weight_decay=0")
ADAMW = ("optim.lr=0.01", "optim.eps=1e-3", "optim.clip=1")
MUON = (*ADAMW, "optim.name=muon")
STEPS = 3
MIN_UPDATE = 1e-2  # smaller updates, relative to the largest one, are compared as if they had this size
SYNC_MESSAGE = "called a synchronizing CUDA operation"


def make_batch(config: Config, step: int, attention_mask: AttentionMask = CAUSAL) -> Batch:
    """Make random ids; each row has another number of scored targets."""
    generator = torch.Generator().manual_seed(step)
    shape = (config.data.global_batch, config.data.seq_len + 1)
    ids = torch.randint(config.model.vocab_size, shape, generator=generator)
    targets = ids[:, 1:].clone()
    for row in range(len(ids)):
        targets[row, : row * 5] = -100
    return Batch.build(ids[:, :-1].contiguous(), targets, attention_mask)


def take_steps(
    engine: NativeEngine, steps: int = STEPS, attention_mask: AttentionMask = CAUSAL
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return (loss and gradient norm of each step, the update of each parameter over all steps)."""
    before = {name: to_local(each).detach().clone() for name, each in engine.named_parameters()}
    reports = [
        train_step(engine, [make_batch(engine.config, n, attention_mask)], engine.config.optim.lr, n)
        for n in range(steps)
    ]
    scalars = [value.detach() for report in reports for value in (report.loss, report.grad_norm)]
    return scalars, {name: to_local(each).detach() - before[name] for name, each in engine.named_parameters()}


def compare_steps(
    comparison: Comparison,
    what: str,
    actual: tuple[list[Tensor], dict[str, Tensor]],
    expected: tuple[list[Tensor], dict[str, Tensor]],
    scalar_tolerance: float,
    update_tolerance: float,
) -> None:
    """Compare losses, norms and updates; an update's error is relative to its largest element."""
    for number, (one, other) in enumerate(zip(actual[0], expected[0], strict=True)):
        comparison.close(f"{what}: {'grad_norm' if number % 2 else 'loss'}", one, other, scalar_tolerance)
    if not comparison.context.has_values:
        return
    largest = max(update.abs().max().item() for update in expected[1].values())
    for name, update in expected[1].items():
        difference = (actual[1][name].cpu().double() - update.cpu().double()).abs().max().item()
        size = max(update.abs().max().item(), MIN_UPDATE * largest)
        comparison.at_most(f"{what}: updates", difference / size, update_tolerance)


def check_step(context: Context) -> dict[str, object]:
    """Three fp32 steps of two models with each optimizer, on the device and on the CPU, agree within 1e-4."""
    comparison = Comparison(context)
    for model in ("llama-cpu", "gpt2-cpu"):
        for name, overrides in (("sgd", SGD), ("adamw", ADAMW), ("muon", MUON)):
            config = small_config(*overrides, model=model)
            actual = take_steps(NativeEngine(config, context.device), STEPS if context.has_values else 1)
            expected = take_steps(NativeEngine(config, CPU)) if context.has_values else actual
            compare_steps(comparison, f"{model} {name}", actual, expected, 1e-4, 1e-3 if name == "muon" else 1e-4)
    return comparison.row()


def check_step_bf16(context: Context) -> dict[str, object]:
    """bf16 on the device is within 1% of the loss and 5% of the norm of fp32 on the CPU, and not equal to it."""
    comparison = Comparison(context)
    expected = take_steps(NativeEngine(small_config(*SGD), CPU), 1)
    actual = take_steps(NativeEngine(small_config(*SGD, "precision=bf16"), context.device), 1)
    comparison.close("loss", actual[0][0], expected[0][0], 1e-2)
    comparison.close("grad_norm", actual[0][1], expected[0][1], 5e-2)
    if context.has_values:
        cosine = min(_cosine(actual[1][name], update) for name, update in expected[1].items())
        comparison.at_most("updates: 1 - cosine", 1 - cosine, 1e-2)
        comparison.is_true("bf16 computed what fp32 computes", actual[0][0].item() != expected[0][0].item())
    return comparison.row()


def _cosine(one: Tensor, other: Tensor) -> float:
    return nn.functional.cosine_similarity(one.cpu().double().flatten(), other.double().flatten(), dim=0).item()


def check_compile(context: Context) -> dict[str, object]:
    """Compiled blocks equal eager ones in fp32, also with selective recomputation."""
    comparison = Comparison(context)
    steps = STEPS if context.has_values else 1
    expected = take_steps(NativeEngine(small_config(*SGD), context.device), steps)
    for recompute in ("none", "selective"):
        config = small_config(*SGD, "compile=true", f"parallel.recompute={recompute}")
        actual = take_steps(NativeEngine(config, context.device), steps)
        compare_steps(comparison, f"recompute {recompute}", actual, expected, 1e-4, 1e-4)
    return comparison.row()


def check_fp8_step(context: Context, compiled: bool) -> dict[str, object]:
    """In ten steps on one batch, losses in float8 are within 2% of those in bf16, and they fall."""
    comparison, steps = Comparison(context), 10 if context.has_values else 1
    losses = {}
    for fp8 in (True, False):
        config = small_config("precision=bf16", f"fp8={fp8}", f"compile={compiled}", "optim.lr=0.003")
        engine = NativeEngine(config, context.device)
        losses[fp8] = [train_step(engine, [make_batch(config, 0)], 3e-3, step).loss for step in range(steps)]
    comparison.close("loss of the first step", losses[True][0], losses[False][0], 1e-2)
    comparison.close("losses of ten steps", torch.stack(losses[True]).sum(), torch.stack(losses[False]).sum(), 2e-2)
    if context.has_values:
        comparison.is_true("the loss does not fall", losses[True][-1].item() < 0.98 * losses[True][0].item())
    return comparison.row()


def check_generation(context: Context) -> dict[str, object]:
    """The device's tokens equal the CPU's, with and without the KV cache; logits agree within 1e-4."""
    comparison = Comparison(context)
    config = small_config()
    model = build_model(config.model).eval()
    init_parameters(model, config)
    device_model = copy.deepcopy(model).to(context.device)
    ids = torch.arange(3, 20)[None]
    for name, cache in (("without a cache", None), ("with a cache", KVCache())):
        with torch.no_grad():
            logits = device_model(ids.to(context.device), mask=CAUSAL, cache=cache)
            last = device_model(ids[:, :5].to(context.device), mask=CAUSAL, cache=cache) if cache else logits
            expected = model(torch.cat((ids, ids[:, :5]), 1) if cache else ids, mask=CAUSAL)
        comparison.close(f"logits {name}", last[:, -1], expected[:, -1], 1e-4)
    if context.has_values:
        prompt, greedy = Prompt(list(range(3, 20))), Sampling(max_tokens=16, temperature=0.0)
        expected_ids = list(generate_tokens(model, prompt, greedy, 64))
        for use_cache in (True, False):
            what = f"tokens {'with' if use_cache else 'without'} a cache"
            comparison.equal(what, list(generate_tokens(device_model, prompt, greedy, 64, use_cache)), expected_ids)
    return comparison.row()


def check_checkpoint(context: Context) -> dict[str, object]:
    """A checkpoint saved on the device and read on the CPU has the same bits, and the same next step."""
    comparison = Comparison(context)
    config = small_config(*ADAMW)
    engine, other = NativeEngine(config, context.device), NativeEngine(config, CPU)
    take_steps(engine, 2)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointStore(Path(folder))
        if not context.has_values:
            checkpoints.staging.copy(engine.state.weights() | engine.state.moments())
            return comparison.row()
        checkpoints.save(engine.state, Progress(step=2), {})
        checkpoints.finish()
        checkpoint = checkpoints.latest_verified()
        assert checkpoint is not None
        store.load(checkpoint, other.state)
    state = engine.state.weights() | engine.state.moments()
    for name, tensor in (other.state.weights() | other.state.moments()).items():
        comparison.equal(name, state[name], tensor)
    compare_steps(comparison, "the next step", take_steps(engine, 1), take_steps(other, 1), 1e-4, 1e-4)
    return comparison.row(tensors=len(state))


def check_one_rank(context: Context) -> dict[str, object]:
    """In a process group of one rank, collectives work, and a step under FSDP2 equals one without."""
    comparison = Comparison(context)
    config = small_config(*SGD)
    expected = take_steps(NativeEngine(config, context.device), 1)
    with context.process_group():
        x = torch.arange(8.0, device=context.device)
        for what, collective in _collectives(x).items():
            comparison.equal(what, collective, x)
        engine = NativeEngine(config, context.device)
        assert engine.mesh is not None
        with torch.device("meta"):
            model = build_model(config.model)
        apply_fsdp(model, config, build_mesh(config.parallel, context.device.type))
        model.to_empty(device=context.device)
        init_parameters(model, config)
        engine.model_parts, engine._named_parameters = [model], list(model.named_parameters())
        engine.optimizer = engine._build_optimizer()
        compare_steps(comparison, "FSDP2", take_steps(engine, 1), expected, 1e-5, 1e-5)
        del engine, model
    return comparison.row()


def _collectives(x: Tensor) -> dict[str, Tensor]:
    """Run each collective that layouts use on one rank, where it changes nothing."""
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
        **{name: functional_collectives.wait_tensor(each) for name, each in pending.items()},
    }


def check_host_syncs(context: Context, overrides: Sequence[str], documents: bool = False) -> dict[str, object]:
    """A step never makes the host wait for the device; a fake GPU raises if it is read."""
    if context.kind == "cpu":
        raise SkippedError("a CPU has no host syncs")
    comparison = Comparison(context)
    config = small_config("precision=bf16", *overrides)
    engine = NativeEngine(config, context.device)
    ids_BT = torch.arange(config.data.seq_len).expand(config.data.global_batch, -1) * 4 // config.data.seq_len
    attention_mask = AttentionMask(causal=True, documents_BT=ids_BT) if documents else CAUSAL
    batch = make_batch(config, 0, attention_mask).pin_memory()
    for step in range(2):
        train_step(engine, [batch], 1e-3, step)
    with warnings.catch_warnings(record=True) as warning_messages:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train_step(engine, [batch], 1e-3, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{each.filename}:{each.lineno}" for each in warning_messages if SYNC_MESSAGE in str(each.message)]
    comparison.at_most("syncs of a step", len(lines), 0)
    return comparison.row(syncs=len(lines), lines=lines)


assert SMALL_VOCABULARY > 20  # the prompt of `check_generation`
