"""Benchmarks skip bf16 by default on a CPU that lacks bf16 instructions."""

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("bf16", "precisions"), [(2e12, ["fp32", "bf16"]), (1e9, ["fp32"])], ids=["fast bf16", "slow bf16"]
)
def test_bf16_is_skipped_if_its_matrix_products_are_slow(bf16, precisions, monkeypatch, capsys) -> None:
    rates = {"fp32": 1.5e11, "bf16": bf16}
    monkeypatch.setattr(measure, "measure_matmul_rate", lambda device, precision, size, tries: rates[precision])
    assert measure.choose_precisions(None, CPU) == precisions
    assert ("bf16 is left out" in capsys.readouterr().err) == (precisions == ["fp32"])
    assert measure.choose_precisions(["bf16"], CPU) == ["bf16"], "an explicit choice is changed"
