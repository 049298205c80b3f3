"""The law tests pass with the kernels of other CPUs and with one or two threads: they do not depend on rounding."""

import os
import subprocess
import sys

import pytest

# Kernels without AVX, kernels for AVX2, and the kernels of this CPU.
KERNELS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "native": {},
}
CASES = ("tests/laws/test_covering.py", "tests/laws/test_optimizers.py")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_law_holds_with_these_kernels(kernels: str, num_threads: int) -> None:
    environment = {
        **os.environ,
        **KERNELS[kernels],
        "OMP_NUM_THREADS": str(num_threads),
        "LAW_THREADS": str(num_threads),
    }
    command = [sys.executable, "-m", "pytest", *CASES, "-k", "not compile", "-p", "no:cacheprovider"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout[-4000:]
