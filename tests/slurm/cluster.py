"""A private Slurm on this machine: a controller and several slurmds, each of which is a node with two processors."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.commands import REPOSITORY

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NODES = 2
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={base}/munge/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobacctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
CompleteWait=0
JobRequeue=1
MailProg=/bin/true
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=4096 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why no cluster can run here; empty if one can."""
    if os.geteuid():
        return "needs root, to start slurmd"
    missing_programs = [name for name in PROGRAMS if shutil.which(name) is None]
    return (
        f"needs {', '.join(missing_programs)} (apt install slurmctld slurmd slurm-client munge)"
        if missing_programs
        else ""
    )


class Cluster:
    """A cluster with its files in `base`; jobs are submitted from `home`."""

    def __init__(self, base: Path, home: Path) -> None:
        self.base, self.home = base, home
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = {
            **clean,
            "SLURM_CONF": str(base / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{clean['PATH']}:/usr/sbin",
        }

    def call(self, *arguments: object, check: bool = True, seconds: float = 60) -> str:
        completed = subprocess.run(
            list(map(str, arguments)),
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert not check or completed.returncode == 0, f"{arguments}: {completed.stdout}{completed.stderr}"
        return completed.stdout

    def submit(self, *arguments: object, **environment: str) -> int:
        previous, self.environment = self.environment, {**self.environment, **environment}
        try:
            return int(self.call("sbatch", "--parsable", *arguments))
        finally:
            self.environment = previous

    def job(self, number: int) -> dict[str, str]:
        arguments = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(item.split("=", 1) for item in arguments if "=" in item)

    def wait(self, number: int, seconds: float) -> dict[str, str]:
        """Wait for the end of the job; return its fields. The error message contains the job's log."""
        deadline = time.monotonic() + seconds
        while True:
            fields = self.job(number)
            if fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return fields
            assert time.monotonic() < deadline, f"{fields['JobState']} after {seconds} s:\n{self.log(number)}"
            time.sleep(0.3)

    def log(self, number: int) -> str:
        path = self.home / f"slurm-{number}.log"
        return path.read_text() if path.exists() else ""

    def start(self) -> None:
        for name in ("state", "log", "munge", *(f"spool-n{node}" for node in range(1, NODES + 1))):
            (self.base / name).mkdir()
        self.base.chmod(0o755)
        (self.base / "munge").chmod(0o711)
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port = _find_free_ports(NODES + 1)
        host = socket.gethostname().split(".")[0]
        names = {"base": self.base, "host": host, "port": port, "first": port + 1, "last": port + NODES, "nodes": NODES}
        (self.base / "slurm.conf").write_text(CONF.format(**names))
        munge = self.base / "munge"
        self.call(
            *("munged", "--force", f"--key-file={key}", f"--socket={munge}/munge.socket"),
            *(
                f"--pid-file={self.base}/munged.pid",
                f"--log-file={self.base}/log/munged.log",
                f"--seed-file={munge}/seed",
            ),
        )
        self.call("slurmctld", "-c")
        for node in range(1, NODES + 1):
            self.call("slurmd", "-N", f"n{node}")
        deadline = time.monotonic() + 30
        while self.call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(NODES):
            assert time.monotonic() < deadline, self.call("sinfo", check=False)
            time.sleep(0.2)

    def stop(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=10, check=False)
        time.sleep(0.5)
        for path in (*self.base.glob("n*.pid"), self.base / "slurmctld.pid", self.base / "munged.pid"):
            _stop_daemon(path)


def _stop_daemon(path: Path) -> None:
    """Stop the daemon whose process id is in the file."""
    try:
        process = int(path.read_text())
        os.kill(process, signal.SIGTERM)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return
    for _ in range(50):
        stat = Path(f"/proc/{process}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)


def _find_free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports."""
    for first in range(17_100, 18_000, 10):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", first + offset)) for offset in range(count)):
                return first
    raise RuntimeError("no free ports")


@contextmanager
def running(base: Path, home: Path) -> Iterator[Cluster]:
    cluster = Cluster(base, home)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
