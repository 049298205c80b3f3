"""A gloo group has one worker thread, because two threads damage the heap (`compat.use_one_thread_per_gloo_group`)."""

import os
import subprocess
import sys

import pytest

from tests.e2e.commands import find_free_port

# Prints the number of worker threads of each group, the timeout, and whether torch knows the backend as gloo's.
COLLECTIVES_SCRIPT = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from dist_llm.launch.process_group import process_group
from dist_llm.launch.world import World
for _ in range(2):
    with process_group(World(), torch.device("cpu"), timeout_seconds=77, even_if_single=True):
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
        for group in (dist.group.WORLD, dist.new_group([0]), mesh.get_group("b")):
            backend = group._get_backend(torch.device("cpu"))
            known = isinstance(backend, dist.distributed_c10d.ProcessGroupGloo)
            print(backend.options._threads, backend.options._timeout.total_seconds() <= 1800, known)
        dist.monitored_barrier()
        value = torch.ones(2)
        dist.all_reduce(value)
        assert value.tolist() == [1, 1]
"""


@pytest.mark.parametrize("interface", ["", "lo"])
def test_each_gloo_group_has_one_thread(interface: str) -> None:
    ranks = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
    }
    environment = {**os.environ, **ranks} | ({"GLOO_SOCKET_IFNAME": interface} if interface else {})
    completed = subprocess.run(
        [sys.executable, "-c", COLLECTIVES_SCRIPT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines() == ["1 True True"] * 6
