"""Describe the machine on which `gpu.py` runs, and check that it has what the cases need."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from gpu_context import CaseContext

MIN_TORCH_VERSION = (2, 11)
REPORTED_PACKAGES = ("triton", "transformers", "numpy", "pytest")
# Modules that may be missing, and what is then skipped. gpu_start.py checks the modules that all cases need.
OPTIONAL_MODULES = {
    "datasets": "prepare from a dataset of the Hugging Face hub; no case needs it",
    "datasketch": "prepare with near duplicates removed; no case needs it",
    "pytest": "the case `pytest -m gpu`",
    "pytest_timeout": "the case `pytest -m gpu`",
    "liger_kernel": "nothing; no case needs it",
}


def check_environment(context: CaseContext) -> dict[str, Any]:
    """Check whether this machine can run the cases: the version of torch, a free GPU, triton and a C compiler."""
    failures = []
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH_VERSION:
        failures.append(f"torch {torch.__version__}: 2.11 or newer is needed")
    missing = {name: purpose for name, purpose in OPTIONAL_MODULES.items() if find_spec(name) is None}
    result: dict[str, Any] = {"missing": missing}
    if context.device_kind == "cuda":
        if find_spec("triton") is None:
            failures.append("triton is missing: the loss on a GPU is a compiled kernel; install triton")
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            failures.append("no C compiler (cc, gcc or clang), which triton needs: install gcc")
        free_bytes, total_bytes = torch.cuda.mem_get_info(context.device)
        result |= {"free_bytes": free_bytes, "total_bytes": total_bytes}
        if free_bytes < 0.8 * total_bytes:
            used_gib = (total_bytes - free_bytes) / 2**30
            failures.append(f"{used_gib:.0f} GiB of the memory of the GPU are in use: end the other programs on it")
    return {**result, "broken": failures}


def describe_hardware(context: CaseContext) -> dict[str, Any]:
    """Return what `Results.collect_environment` lacks: the GPU, its driver, and the versions of CUDA libraries."""
    description: dict[str, Any] = {"device": context.device_kind}
    for name in REPORTED_PACKAGES:
        try:
            description[name] = version(name)
        except PackageNotFoundError:
            description[name] = "not installed"
    if context.device_kind == "cuda":
        description |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        description |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "nvidia_smi": _query_nvidia_smi()}
    return description


def _query_nvidia_smi() -> str:
    """Return the name, driver, memory, power limit and clocks of GPU 0; an empty string if nvidia-smi does not run."""
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"nvidia-smi: {error}", file=sys.stderr)
        return ""
