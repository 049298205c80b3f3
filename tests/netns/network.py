"""Nodes on one machine: network namespaces with names and addresses of their own, joined by a bridge."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

HOSTS = Path("/etc/netns")


def missing() -> str:
    """Why there can be no such nodes here; empty if there can."""
    if os.geteuid():
        return "needs root, to make network namespaces"
    if lacking := [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)} (apt install iproute2)"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return f"network namespaces cannot be made: {made.stderr.strip()}" if made.returncode else ""


class Network:
    """`count` nodes, numbered from 1."""

    def __init__(self, count: int) -> None:
        self.count, self.tag = count, f"dl{os.getpid() % 100_000}"
        self.subnet = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"

    def space(self, node: int) -> str:
        return f"{self.tag}n{node}"

    def address(self, node: int) -> str:
        return f"{self.subnet}.{node}"

    def start(self) -> None:
        _ip("netns", "add", f"{self.tag}hub")
        _in(f"{self.tag}hub", "ip", "link", "add", "bridge", "type", "bridge")
        _in(f"{self.tag}hub", "ip", "link", "set", "bridge", "up")
        names = "".join(f"{self.address(node)} n{node}\n" for node in range(1, self.count + 1))
        for node in range(1, self.count + 1):
            space = self.space(node)
            _ip("netns", "add", space)
            folder = HOSTS / space
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            _ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", f"port{node}", "netns", f"{self.tag}hub")
            _in(f"{self.tag}hub", "ip", "link", "set", f"port{node}", "master", "bridge", "up")
            _in(space, "ip", "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _in(space, "ip", "link", "set", device, "up")

    def stop(self) -> None:
        for space in (*(self.space(node) for node in range(1, self.count + 1)), f"{self.tag}hub"):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
            with suppress(FileNotFoundError):
                shutil.rmtree(HOSTS / space)

    def link(self, node: int, up: bool) -> None:
        """Plug a node's cable in, or pull it: nobody is told."""
        _in(f"{self.tag}hub", "ip", "link", "set", f"port{node}", "up" if up else "down")

    def limit(self, node: int, rate: str) -> None:
        """Let a node's cable carry no more than so much each way, in tc's units (`5mbit`: 5 million bits a second)."""
        bucket = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
        for space, device in ((self.space(node), "eth0"), (f"{self.tag}hub", f"port{node}")):
            _in(space, "tc", "qdisc", "replace", "dev", device, *bucket)

    def sent(self, node: int) -> int:
        """Bytes that the node put on its cable so far."""
        return int(_in(self.space(node), "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def processes(self, node: int) -> list[int]:
        """All that run on a node, whoever started them."""
        return [int(process) for process in _ip("netns", "pids", self.space(node)).split()]

    def on(self, node: int, words: Sequence[str]) -> list[str]:
        """A command as it runs on the node, which goes by its name there."""
        named = f'hostname n{node}; exec "$@"'
        return ["ip", "netns", "exec", self.space(node), "unshare", "--uts", "bash", "-c", named, "node", *words]


@contextmanager
def network(count: int) -> Iterator[Network]:
    found = Network(count)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def _in(space: str, *words: str) -> str:
    return _ip("netns", "exec", space, *words)
