"""The environment of torchrun or Slurm becomes a World.

Without one there is one process; incomplete variables are errors.
"""

import socket
from itertools import combinations

import pytest
import torch

from dist_llm.errors import ConfigError
from dist_llm.launch.group import barrier, device_of, process_group
from dist_llm.launch.world import World, read_world

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_torchrun_variables_give_the_world():
    world = read_world({**TORCHRUN, "MASTER_ADDR": "elsewhere", "GROUP_RANK": "2"})
    assert world == World(5, 8, 1, socket.gethostname())
    assert not world.main
    assert read_world({**TORCHRUN, "RANK": "0"}).main


def test_without_variables_there_is_one_process():
    world = read_world({"PATH": "/bin", "MASTER_PORT": "1"})
    assert (world.rank, world.size, world.local_rank, world.main) == (0, 1, 0, True)
    assert world.host == socket.gethostname()


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURMD_NODENAME": "n7"}
RENDEZVOUS = {"MASTER_ADDR": "n1", "MASTER_PORT": "20001"}


def test_a_slurm_task_is_a_rank():
    assert read_world({**SLURM, **RENDEZVOUS}) == World(5, 8, 1, "n7")
    assert read_world({**SLURM, **TORCHRUN, "RANK": "3"}) == World(3, 8, 1, "n7"), (
        "torchrun's variables take precedence over Slurm's"
    )


def test_slurm_tasks_without_a_rendezvous_address_are_refused():
    with pytest.raises(ConfigError, match="8 Slurm tasks, but MASTER_ADDR and MASTER_PORT are not set"):
        read_world({**SLURM, "MASTER_ADDR": "n1"})


@pytest.mark.parametrize("changes", [{"SLURM_STEP_ID": None}, {"SLURM_NTASKS": "1"}], ids=["batch script", "one task"])
def test_a_batch_script_or_a_single_task_is_one_process(changes):
    """A batch script and a shell have Slurm's variables of tasks, too."""
    environ = {name: value for name, value in {**SLURM, **changes}.items() if value is not None}
    assert read_world(environ) == World(host="n7")


@pytest.mark.parametrize("present", [c for n in (1, 2) for c in combinations(TORCHRUN, n)], ids="+".join)
def test_incomplete_variables_are_an_error_that_names_the_missing_ones(present):
    with pytest.raises(ConfigError, match="start with torchrun, or unset them all") as excinfo:
        read_world({name: TORCHRUN[name] for name in present})
    missing = [name for name in TORCHRUN if name not in present]
    assert f"environment: {', '.join(missing)} is not set" in str(excinfo.value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("RANK", "x", "must be whole numbers"),
        ("WORLD_SIZE", "", "must be whole numbers"),
        ("LOCAL_RANK", "1.5", "must be whole numbers"),
        ("RANK", "8", "at least 0 and below WORLD_SIZE"),
        ("RANK", "-1", "at least 0 and below WORLD_SIZE"),
        ("LOCAL_RANK", "-1", "at least 0 and below WORLD_SIZE"),
        ("LOCAL_RANK", "8", "at least 0 and below WORLD_SIZE"),
        ("WORLD_SIZE", "0", "at least 0 and below WORLD_SIZE"),
    ],
)
def test_invalid_values_are_refused(name, value, rule):
    with pytest.raises(ConfigError, match=rf"environment: .*{name}={value}.*{rule}; start with torchrun"):
        read_world({**TORCHRUN, name: value})


def test_each_local_rank_has_its_gpu_or_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(World(3, 4, 3)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(World(3, 4, 1)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="rank 6 on node7 needs GPU 2, but the node has only 2"):
        device_of(World(6, 8, 2, "node7"))


def test_one_process_needs_no_process_group():
    with process_group(World(), torch.device("cpu")):
        assert not torch.distributed.is_initialized()
        barrier()


@pytest.mark.parametrize(
    ("environ", "expected_text"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "PMI_SIZE=4"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE=2"),
        ({"FLUX_JOB_SIZE": "2"}, "FLUX_JOB_SIZE=2"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0"),
        ({"PALS_RANKID": "3"}, "PALS_RANKID=3"),
        ({**SLURM, "SLURM_NTASKS": "1", "PMI_SIZE": "2"}, "PMI_SIZE=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rank_of_an_unsupported_launcher_is_refused(environ, expected_text):
    with pytest.raises(
        ConfigError, match=rf"{expected_text} says that .* RANK, WORLD_SIZE, LOCAL_RANK are not set.*torchrun"
    ):
        read_world(environ)
    assert read_world({**environ, **TORCHRUN}).size == 8, "RANK takes precedence over the launcher's variables"


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {**SLURM, "SLURM_NTASKS": "1", "PMIX_RANK": "0"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_an_unsupported_launcher_with_one_process_is_accepted(environ):
    assert read_world(environ).size == 1


def test_a_port_in_use_is_refused(monkeypatch):
    with socket.socket() as socket_in_use:
        socket_in_use.bind(("127.0.0.1", 0))
        socket_in_use.listen()
        port = str(socket_in_use.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with (
            pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: another program uses this port; set another"),
            process_group(World(0, 2), torch.device("cpu"), timeout_seconds=5),
        ):
            pass


def test_a_rendezvous_without_all_ranks_fails(monkeypatch):
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = str(free_socket.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with (
        pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: rendezvous failed: .*1/2 clients joined"),
        process_group(World(0, 2), torch.device("cpu"), timeout_seconds=0.5),
    ):
        pass
