"""Nodes on one machine: network namespaces with host names and addresses, connected by a bridge."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HOSTS = Path("/etc/netns")


def missing() -> str:
    """Return why network namespaces cannot be created here; empty if they can."""
    if os.geteuid():
        return "needs root, to make network namespaces"
    if missing_programs := [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]:
        return f"needs {', '.join(missing_programs)} (apt install iproute2)"
    name = f"probe{os.getpid()}"
    completed = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return f"network namespaces cannot be made: {completed.stderr.strip()}" if completed.returncode else ""


class Network:
    """A network of `count` nodes, numbered from 1."""

    def __init__(self, count: int) -> None:
        self.count, self.tag = count, f"dl{os.getpid() % 100_000}"
        self.subnet = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"

    def space(self, node: int) -> str:
        return f"{self.tag}n{node}"

    def address(self, node: int) -> str:
        return f"{self.subnet}.{node}"

    def start(self) -> None:
        _run_ip("netns", "add", f"{self.tag}hub")
        _run_in_namespace(f"{self.tag}hub", "ip", "link", "add", "bridge", "type", "bridge")
        _run_in_namespace(f"{self.tag}hub", "ip", "link", "set", "bridge", "up")
        names = "".join(f"{self.address(node)} n{node}\n" for node in range(1, self.count + 1))
        for node in range(1, self.count + 1):
            space = self.space(node)
            _run_ip("netns", "add", space)
            folder = HOSTS / space
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            _run_ip(
                "link", "add", "eth0", "netns", space, "type", "veth", "peer", f"port{node}", "netns", f"{self.tag}hub"
            )
            _run_in_namespace(f"{self.tag}hub", "ip", "link", "set", f"port{node}", "master", "bridge", "up")
            _run_in_namespace(space, "ip", "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run_in_namespace(space, "ip", "link", "set", device, "up")

    def stop(self) -> None:
        for space in (*(self.space(node) for node in range(1, self.count + 1)), f"{self.tag}hub"):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
            with suppress(FileNotFoundError):
                shutil.rmtree(HOSTS / space)

    def link(self, node: int, up: bool) -> None:
        """Connect or disconnect a node's cable. No process is notified."""
        _run_in_namespace(f"{self.tag}hub", "ip", "link", "set", f"port{node}", "up" if up else "down")

    def limit(self, node: int, rate: str) -> None:
        """Limit a node's bandwidth in each direction, in tc's units (`5mbit`: 5 million bits per second)."""
        bucket = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
        for space, device in ((self.space(node), "eth0"), (f"{self.tag}hub", f"port{node}")):
            _run_in_namespace(space, "tc", "qdisc", "replace", "dev", device, *bucket)

    def sent(self, node: int) -> int:
        """Return the bytes that the node has sent."""
        return int(_run_in_namespace(self.space(node), "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def processes(self, node: int) -> list[int]:
        """Return all processes that run on a node."""
        return [int(process) for process in _run_ip("netns", "pids", self.space(node)).split()]

    def on(self, node: int, arguments: Sequence[str]) -> list[str]:
        """Return a command that runs on the node with the node's host name."""
        script = f'hostname n{node}; exec "$@"'
        return ["ip", "netns", "exec", self.space(node), "unshare", "--uts", "bash", "-c", script, "node", *arguments]


@contextmanager
def running_network(count: int) -> Iterator[Network]:
    net = Network(count)
    try:
        net.start()
        yield net
    finally:
        net.stop()


def _run_ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def _run_in_namespace(space: str, *arguments: str) -> str:
    return _run_ip("netns", "exec", space, *arguments)
