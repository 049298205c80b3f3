"""The environment of `gpu.py`: facts about the machine for the results, and a check of what the rows need."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from gpu_context import Context

MIN_TORCH = (2, 11)
PACKAGES = ("triton", "transformers", "numpy", "pytest")
# Modules that may be missing, and what is then skipped. gpu_start.py checks the modules that every row needs.
OPTIONAL = {
    "datasets": "prepare from a hub's dataset; no row needs it",
    "datasketch": "prepare with near duplicates removed; no row needs it",
    "pytest": "the row `pytest -m gpu`",
    "pytest_timeout": "the row `pytest -m gpu`",
    "liger_kernel": "nothing; no row needs it",
}


def check_environment(context: Context) -> dict[str, Any]:
    """Check whether this machine can run the rows: torch's version, a free GPU, triton and a C compiler."""
    failures = []
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
        failures.append(f"torch {torch.__version__}: 2.11 or newer is needed")
    missing = {name: use for name, use in OPTIONAL.items() if find_spec(name) is None}
    result: dict[str, Any] = {"missing": missing}
    if context.kind == "cuda":
        if find_spec("triton") is None:
            failures.append("triton is missing: the loss on a GPU is a compiled kernel")
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            failures.append("no C compiler (cc, gcc or clang), which triton needs: install gcc")
        free, total = torch.cuda.mem_get_info(context.device)
        result |= {"free_bytes": free, "total_bytes": total}
        if free < 0.8 * total:
            failures.append(
                f"{(total - free) / 2**30:.0f} GiB of the GPU's memory are in use: another program runs there"
            )
    return {**result, "broken": failures}


def hardware(context: Context) -> dict[str, Any]:
    """Return the facts that results.py lacks: the GPU, its driver, and the libraries of CUDA."""
    facts: dict[str, Any] = {"device": context.kind}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if context.kind == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        facts |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "nvidia_smi": _nvidia_smi()}
    return facts


def _nvidia_smi() -> str:
    """Return name, driver, power limit and clocks, or nothing if the program is missing."""
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"nvidia-smi: {error}", file=sys.stderr)
        return ""
