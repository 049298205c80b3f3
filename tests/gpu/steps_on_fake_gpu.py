"""Take training steps on a fake GPU (benchmarks/fake_gpu.py) and print a JSON line per case.

    python -m tests.gpu.steps_on_fake_gpu                       # all models and layouts
    python -m tests.gpu.steps_on_fake_gpu --plant norm_is_read  # one case with a planted bug

test_steps_on_fake_gpu.py runs this program and checks the lines. A line has the devices of the results and the dtypes
of the matrix products, or the error of the step.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import fake_gpu
from dist_llm.engines.base import DataParallelRank
from dist_llm.engines.native import NativeEngine
from dist_llm.models import attention
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config
from tests.laws.layouts import ADAMW, BF16_MOMENTS, DOCUMENTS, MODELS, MUON, PREFIX

MATMUL_OPERATORS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.out}
LAYOUTS = {
    "dp_shard": {"dp_shard": 8},
    "dp_replicate": {"dp_replicate": 8},
    "dp_replicate, dp_shard": {"dp_replicate": 2, "dp_shard": 4, "reshard": "always"},
    "tp": {"dp_shard": 2, "tp": 4},
    "tp, sequence_parallel off": {"dp_shard": 2, "tp": 4, "sequence_parallel": False},
    "cp": {"dp_shard": 2, "cp": 4},
    "selective": {"dp_shard": 8, "recompute": "selective"},
    "full": {"dp_shard": 8, "recompute": "full"},
    "offload": {"dp_shard": 8, "cpu_offload": True},
    "offload, tp": {"dp_shard": 2, "tp": 4, "cpu_offload": True},
}


def iter_cases() -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield name, number of ranks, and keywords of make_config."""
    for model, keys in MODELS.items():
        yield model, 1, {"model": keys, "precision": "bf16"}
    yield "fp32", 1, {}
    yield "prefix", 1, PREFIX
    yield "documents", 1, DOCUMENTS
    yield "documents, bf16", 1, DOCUMENTS | {"precision": "bf16"}
    yield "dropout", 1, {"model": {"dropout": 0.1}}
    yield "muon", 1, {"optim": MUON, "precision": "bf16"}
    yield "moments in bf16", 1, {"optim": BF16_MOMENTS, "precision": "bf16"}
    yield "fp8", 1, {"model": {"d_model": 64, "d_ff": 64}, "precision": "bf16", "fp8": True}
    for name, parallel in LAYOUTS.items():
        yield name, 8, {"precision": "bf16", "parallel": parallel}
    for model in ("t5", "bert", "encoder_decoder"):
        yield f"{model}, tp", 8, {"model": MODELS[model], "precision": "bf16", "parallel": LAYOUTS["tp"]}
    yield "muon, dp_shard", 8, {"optim": MUON, "precision": "bf16", "parallel": {"dp_shard": 8}}
    yield "dropout, tp", 8, {"model": {"dropout": 0.1}, "precision": "bf16", "parallel": {"dp_shard": 2, "tp": 4}}


class MatmulDtypes(TorchDispatchMode):
    """Collects the dtypes of matrix products on the GPU, except those of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(tensor_type, DTensor) for tensor_type in types):
            return NotImplemented
        if func in MATMUL_OPERATORS and args[0].device.type == "cuda":
            self.dtypes.add(str(args[-1].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


def take_step(*, ranks: int, sections: dict[str, Any]) -> dict[str, Any]:
    """Take a step and evaluate a batch on rank 0 of `ranks`; return the devices and the matrix product dtypes.

    `sections` are keyword arguments of `make_config`.
    """
    sections = {"optim": ADAMW, **sections}
    model = sections.pop("model", {})
    num_layers = max(3, len(model.get("layers", ())))  # each kind of layer of the model at least once
    config = make_config(ranks=ranks, model={"n_layers": num_layers} | model, **sections)
    dp_size = config.parallel.dp_replicate * config.parallel.dp_shard
    batches = make_batches(config, SimpleNamespace(dp_rank_and_size=DataParallelRank(rank=0, size=dp_size)), step=0)  # type: ignore[arg-type]
    with fake_gpu.activate(ranks):
        engine = NativeEngine(config, fake_gpu.DEVICE)
        with MatmulDtypes() as matmul_dtypes:
            report = train_step(engine, batches, lr=1e-3)
        engine.score(engine.to_local_batch(batches[0]))
        devices = {value.device.type for value in (report.loss, report.grad_norm, report.loss_denominator)}
        return {"devices": sorted(devices), "products": sorted(matmul_dtypes.dtypes)}


def compute_grad_norm_on_host(self: NativeEngine) -> Any:
    """Planted bug: read the value of the gradient norm in each step."""
    norm = original_grad_norm(self)
    return torch.full_like(norm, norm.item())


original_apply_rotary, original_grad_norm = attention.apply_rotary, NativeEngine._compute_grad_norm
BUGS = {
    "none": nullcontext,
    "angles_on_cpu": lambda: patch.object(
        attention, "apply_rotary", lambda x, cos, sin: original_apply_rotary(x, cos.cpu(), sin)
    ),
    "norm_is_read": lambda: patch.object(NativeEngine, "_compute_grad_norm", compute_grad_norm_on_host),
}


def main() -> None:
    """Run all cases, or one case with a planted bug, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plant", choices=BUGS, default="none", help="a bug; default: none")
    bug = parser.parse_args().plant
    fake_gpu.preload()
    for name, ranks, sections in iter_cases() if bug == "none" else [("planted", 1, {})]:
        try:
            with BUGS[bug]():
                row = take_step(ranks=ranks, sections=sections)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": name, **row}), flush=True)


if __name__ == "__main__":
    main()
