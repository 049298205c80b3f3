"""The config sets network variables. A config that contradicts the environment is refused."""

import os

import pytest

from dist_llm.errors import ConfigError
from dist_llm.launch.environment import set_network_variables


def test_network_variables_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_IB_TIMEOUT", "23")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    set_network_variables({"NCCL_DEBUG": "INFO", "NCCL_IB_TIMEOUT": 23, "GLOO_SOCKET_IFNAME": "ib0"})
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "ib0"


def test_a_contradicting_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with pytest.raises(ConfigError, match=r"run\.network\.NCCL_DEBUG: is INFO, but the environment has WARN"):
        set_network_variables({"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO"})
    assert "NCCL_SOCKET_IFNAME" not in os.environ, "a variable is set after an error"
