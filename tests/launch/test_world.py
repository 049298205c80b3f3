"""`read_world` reads the rank from the variables of torchrun or Slurm; `process_group` connects the ranks.

Without these variables there is one process. Incomplete or invalid variables are errors.
"""

import socket
from itertools import combinations

import pytest
import torch

from dist_llm.errors import ConfigError
from dist_llm.launch.process_group import barrier, process_group, select_device
from dist_llm.launch.world import World, read_world

TORCHRUN_ENVIRON = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SLURM_ENVIRON = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURMD_NODENAME": "n7",
}
RENDEZVOUS_ENVIRON = {"MASTER_ADDR": "n1", "MASTER_PORT": "20001"}


def test_read_world_reads_torchrun_variables():
    world = read_world({**TORCHRUN_ENVIRON, "MASTER_ADDR": "elsewhere", "GROUP_RANK": "2"})
    assert world == World(rank=5, world_size=8, local_rank=1, host=socket.gethostname())
    assert not world.is_main
    assert read_world({**TORCHRUN_ENVIRON, "RANK": "0"}).is_main


def test_without_variables_there_is_one_process():
    world = read_world({"PATH": "/bin", "MASTER_PORT": "1"})
    assert (world.rank, world.world_size, world.local_rank, world.is_main) == (0, 1, 0, True)
    assert world.host == socket.gethostname()


def test_a_slurm_task_is_a_rank():
    world = read_world({**SLURM_ENVIRON, **RENDEZVOUS_ENVIRON})
    assert world == World(rank=5, world_size=8, local_rank=1, host="n7")


def test_torchrun_takes_precedence_over_slurm():
    world = read_world({**SLURM_ENVIRON, **TORCHRUN_ENVIRON, "RANK": "3"})
    assert world == World(rank=3, world_size=8, local_rank=1, host="n7")


def test_slurm_tasks_without_a_rendezvous_address_are_refused():
    with pytest.raises(ConfigError, match="8 Slurm tasks, but MASTER_ADDR and MASTER_PORT are not set"):
        read_world({**SLURM_ENVIRON, "MASTER_ADDR": "n1"})


@pytest.mark.parametrize("changes", [{"SLURM_STEP_ID": None}, {"SLURM_NTASKS": "1"}], ids=["batch script", "one task"])
def test_a_batch_script_or_a_single_task_is_one_process(changes):
    """Slurm also sets a task's variables in a batch script and in a shell."""
    environ = {name: value for name, value in {**SLURM_ENVIRON, **changes}.items() if value is not None}
    assert read_world(environ) == World(host="n7")


@pytest.mark.parametrize(
    "present_names", [names for count in (1, 2) for names in combinations(TORCHRUN_ENVIRON, count)], ids="+".join
)
def test_missing_variables_are_named(present_names):
    with pytest.raises(ConfigError, match="start with torchrun, or unset them all") as excinfo:
        read_world({name: TORCHRUN_ENVIRON[name] for name in present_names})
    missing = [name for name in TORCHRUN_ENVIRON if name not in present_names]
    assert f"environment: not set: {', '.join(missing)};" in str(excinfo.value)


@pytest.mark.parametrize(
    ("name", "value", "expected_text"),
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
def test_invalid_values_are_refused(name, value, expected_text):
    with pytest.raises(ConfigError, match=rf"environment: .*{name}={value}.*{expected_text}; start with torchrun"):
        read_world({**TORCHRUN_ENVIRON, name: value})


def test_the_local_rank_selects_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device(World(rank=3, world_size=4, local_rank=3)) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device(World(rank=3, world_size=4, local_rank=1)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="rank 6 on node7 has local rank 2 and needs 3 GPUs, but the node has only 2"):
        select_device(World(rank=6, world_size=8, local_rank=2, host="node7"))


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
        ({**SLURM_ENVIRON, "SLURM_NTASKS": "1", "PMI_SIZE": "2"}, "PMI_SIZE=2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_rank_of_an_unsupported_launcher_is_refused(environ, expected_text):
    with pytest.raises(
        ConfigError, match=rf"{expected_text} says that .* RANK, WORLD_SIZE, LOCAL_RANK are not set.*torchrun"
    ):
        read_world(environ)
    assert read_world({**environ, **TORCHRUN_ENVIRON}).world_size == 8, (
        "the launcher's variables take precedence over RANK"
    )


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {**SLURM_ENVIRON, "SLURM_NTASKS": "1", "PMIX_RANK": "0"},
    ],
    ids=lambda value: next(iter(value)),
)
def test_an_unsupported_launcher_with_one_process_is_accepted(environ):
    assert read_world(environ).world_size == 1


def test_a_port_in_use_is_refused(monkeypatch):
    with socket.socket() as socket_in_use:
        socket_in_use.bind(("127.0.0.1", 0))
        socket_in_use.listen()
        port = str(socket_in_use.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with (
            pytest.raises(
                ConfigError, match=rf"MASTER_PORT={port}: the port is in use; set MASTER_PORT to a free port"
            ),
            process_group(World(rank=0, world_size=2), torch.device("cpu"), timeout_seconds=5),
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
        process_group(World(rank=0, world_size=2), torch.device("cpu"), timeout_seconds=0.5),
    ):
        pass
