"""A network of simulated nodes on one machine: network namespaces with host names, connected by a bridge.

    with running_network(num_nodes=2) as net:
        subprocess.run(net.wrap_command(1, ["ping", "-c", "1", "n2"]), check=True)  # node 1 reaches node 2
        net.set_link(2, up=False)  # as if the cable of node 2 were pulled

test_netns.py and tests/chaos run processes on the nodes, cut links and limit their bandwidth. This needs root.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HOSTS = Path("/etc/netns")  # `ip netns exec` shows a process the files of HOSTS/NAMESPACE in place of those in /etc


def find_obstacle() -> str:
    """Return the reason why network namespaces cannot be created here; empty if they can."""
    if os.geteuid():
        return "needs root, to make network namespaces"
    if missing_programs := [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]:
        return f"needs {', '.join(missing_programs)} (apt install iproute2)"
    name = f"probe{os.getpid()}"
    completed = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return f"network namespaces cannot be made: {completed.stderr.strip()}" if completed.returncode else ""


class Network:
    """A network of the nodes 1, 2, ..., whose host names are n1, n2, ...

    The names of the namespaces contain the id of this process, so several test sessions can run on one machine.
    """

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes, self.tag = num_nodes, f"dl{os.getpid() % 100_000}"
        self.subnet = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"

    def get_namespace(self, node: int) -> str:
        """Return the name of the network namespace of a node."""
        return f"{self.tag}n{node}"

    def get_address(self, node: int) -> str:
        """Return the IP address of a node."""
        return f"{self.subnet}.{node}"

    def start(self) -> None:
        """Create the bridge, and for each node a namespace with a link to the bridge."""
        _run_ip("netns", "add", f"{self.tag}hub")
        _run_in_namespace(f"{self.tag}hub", "ip", "link", "add", "bridge", "type", "bridge")
        _run_in_namespace(f"{self.tag}hub", "ip", "link", "set", "bridge", "up")
        names = "".join(f"{self.get_address(node)} n{node}\n" for node in range(1, self.num_nodes + 1))
        for node in range(1, self.num_nodes + 1):
            namespace = self.get_namespace(node)
            _run_ip("netns", "add", namespace)
            folder = HOSTS / namespace
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            hub = ("peer", f"port{node}", "netns", f"{self.tag}hub")
            _run_ip("link", "add", "eth0", "netns", namespace, "type", "veth", *hub)
            _run_in_namespace(f"{self.tag}hub", "ip", "link", "set", f"port{node}", "master", "bridge", "up")
            _run_in_namespace(namespace, "ip", "address", "add", f"{self.get_address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run_in_namespace(namespace, "ip", "link", "set", device, "up")

    def stop(self) -> None:
        """Delete all namespaces, and with them the links."""
        for namespace in (*(self.get_namespace(node) for node in range(1, self.num_nodes + 1)), f"{self.tag}hub"):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
            with suppress(FileNotFoundError):
                shutil.rmtree(HOSTS / namespace)

    def set_link(self, node: int, *, up: bool) -> None:
        """Connect or disconnect a node as by its cable. No process of the node is notified."""
        _run_in_namespace(f"{self.tag}hub", "ip", "link", "set", f"port{node}", "up" if up else "down")

    def limit_bandwidth(self, node: int, rate: str) -> None:
        """Limit the bandwidth of a node in each direction; `rate` has the units of tc (`5mbit`: 5 Mbit/s)."""
        bucket = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
        for namespace, device in ((self.get_namespace(node), "eth0"), (f"{self.tag}hub", f"port{node}")):
            _run_in_namespace(namespace, "tc", "qdisc", "replace", "dev", device, *bucket)

    def read_sent_bytes(self, node: int) -> int:
        """Return the number of bytes that the node has sent."""
        return int(_run_in_namespace(self.get_namespace(node), "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def list_processes(self, node: int) -> list[int]:
        """Return the ids of all processes that run on a node."""
        return [int(pid) for pid in _run_ip("netns", "pids", self.get_namespace(node)).split()]

    def wrap_command(self, node: int, arguments: Sequence[str]) -> list[str]:
        """Return a command that runs `arguments` on the node, with the host name of the node."""
        enter_namespace = ("ip", "netns", "exec", self.get_namespace(node))
        set_host_name = ("unshare", "--uts", "bash", "-c", f'hostname n{node}; exec "$@"', "node")
        return [*enter_namespace, *set_host_name, *arguments]


@contextmanager
def running_network(*, num_nodes: int) -> Iterator[Network]:
    """Create a network for the block and delete it afterwards."""
    net = Network(num_nodes)
    try:
        net.start()
        yield net
    finally:
        net.stop()


def _run_ip(*arguments: str) -> str:
    """Run `ip ARGUMENTS` and return its stdout."""
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def _run_in_namespace(namespace: str, *arguments: str) -> str:
    """Run a command in a network namespace and return its stdout."""
    return _run_ip("netns", "exec", namespace, *arguments)
