"""What programs of benchmarks/ measure where nobody says."""

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bf16", "left"), [(2e12, ["fp32", "bf16"]), (1e9, ["fp32"])])
def test_bf16_is_left_out_where_a_cpu_has_none(bf16, left, monkeypatch, capsys) -> None:
    rates = {"fp32": 1.5e11, "bf16": bf16}
    monkeypatch.setattr(measure, "matmul_rate", lambda device, precision, size, tries: rates[precision])
    assert measure.precisions(None, CPU) == left
    assert ("bf16 is left out" in capsys.readouterr().err) == (left == ["fp32"])
    assert measure.precisions(["bf16"], CPU) == ["bf16"], "who asks gets it"
