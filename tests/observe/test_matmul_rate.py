"""The matmul rate: the best of several starts, kept by machine, and never a reason to fail."""

import json
from pathlib import Path

import pytest
import torch

from dist_llm.observe import matmul_rate as module
from dist_llm.observe.matmul_rate import NUM_MEASUREMENTS, matmul_rate, measure_matmul_rate

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Rates that are measured, one start after another."""
    rates: list[float] = []
    monkeypatch.setattr(module, "measure_matmul_rate", lambda device, dtype: rates.pop(0))
    return rates


def test_a_measured_rate_is_a_rate() -> None:
    assert 1e8 < measure_matmul_rate(CPU, torch.float32) < 1e14


def test_the_best_of_the_first_starts_is_kept(measured: list[float], tmp_path: Path) -> None:
    """A start on busy cores (2.4e10 where the machine can do 1.8e11) does not lower it."""
    file = tmp_path / "cache" / "rates.json"
    measured += [1.17e11, 2.4e10, 1.8e11, 8.7e10, 1.0e11]
    assert [matmul_rate(CPU, torch.float32, file) for _ in range(NUM_MEASUREMENTS)] == [
        1.17e11,
        1.17e11,
        1.8e11,
        1.8e11,
        1.8e11,
    ]
    assert matmul_rate(CPU, torch.float32, file) == 1.8e11, "without another measurement"
    assert [path.name for path in file.parent.iterdir()] == ["rates.json"]


def test_rates_of_other_dtypes_and_thread_counts_are_others(
    measured: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rates.json"
    measured += [1e11, 3e11, 5e10]
    assert matmul_rate(CPU, torch.float32, file) == 1e11
    assert matmul_rate(CPU, torch.bfloat16, file) == 3e11
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert matmul_rate(CPU, torch.float32, file) == 5e10
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": {"rate": "fast", "starts": 9}}'])
def test_a_damaged_file_is_measured_anew(content: str, measured: list[float], tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(content)
    measured += [1e11]
    assert matmul_rate(CPU, torch.float32, file) == 1e11


def test_a_directory_that_cannot_be_written_is_no_error(measured: list[float], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    measured += [1e11, 2e11]
    assert matmul_rate(CPU, torch.float32, tmp_path / "file" / "rates.json") == 1e11
    assert matmul_rate(CPU, torch.float32, tmp_path / "file" / "rates.json") == 2e11
