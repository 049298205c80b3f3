"""The matmul rate is the best of several measurements and is cached. A cache that fails does not end a run."""

import json
from pathlib import Path

import pytest
import torch

from dist_llm.observe import matmul_rate
from dist_llm.observe.matmul_rate import NUM_MEASUREMENTS, get_matmul_rate, measure_matmul_rate

CPU = torch.device("cpu")


@pytest.fixture
def next_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates of successive measurements."""
    rates: list[float] = []
    monkeypatch.setattr(matmul_rate, "measure_matmul_rate", lambda device, dtype: rates.pop(0))
    return rates


def test_the_measured_rate_is_plausible() -> None:
    assert 1e8 < measure_matmul_rate(CPU, torch.float32) < 1e14


def test_the_best_of_the_first_measurements_is_cached(next_rates: list[float], tmp_path: Path) -> None:
    """A measurement on busy cores (2.4e10 on a machine that reaches 1.8e11) does not lower the rate."""
    cache_file = tmp_path / "cache" / "rates.json"
    next_rates += [1.17e11, 2.4e10, 1.8e11, 8.7e10, 1.0e11]
    assert [get_matmul_rate(CPU, torch.float32, cache_file) for _ in range(NUM_MEASUREMENTS)] == [
        1.17e11,
        1.17e11,
        1.8e11,
        1.8e11,
        1.8e11,
    ]
    assert get_matmul_rate(CPU, torch.float32, cache_file) == 1.8e11, "the cache must keep the best rate"
    assert [path.name for path in cache_file.parent.iterdir()] == ["rates.json"]


def test_rates_are_cached_per_dtype_and_thread_count(
    next_rates: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_file = tmp_path / "rates.json"
    next_rates += [1e11, 3e11, 5e10]
    assert get_matmul_rate(CPU, torch.float32, cache_file) == 1e11
    assert get_matmul_rate(CPU, torch.bfloat16, cache_file) == 3e11
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert get_matmul_rate(CPU, torch.float32, cache_file) == 5e10
    assert len(json.loads(cache_file.read_text())) == 3


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": {"rate": "fast", "starts": 9}}'])
def test_a_damaged_cache_is_measured_again(content: str, next_rates: list[float], tmp_path: Path) -> None:
    cache_file = tmp_path / "rates.json"
    cache_file.write_text(content)
    next_rates += [1e11]
    assert get_matmul_rate(CPU, torch.float32, cache_file) == 1e11


def test_a_directory_that_cannot_be_written_is_no_error(next_rates: list[float], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    next_rates += [1e11, 2e11]
    assert get_matmul_rate(CPU, torch.float32, tmp_path / "file" / "rates.json") == 1e11
    assert get_matmul_rate(CPU, torch.float32, tmp_path / "file" / "rates.json") == 2e11
