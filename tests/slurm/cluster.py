"""A private Slurm cluster on this machine for test_slurm.py: a controller, and slurmds as nodes with two CPUs each."""

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
NUM_NODES = 2
SLURM_CONF = """\
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


def find_obstacle() -> str:
    """Return the reason why no cluster can run here; empty if a cluster can run."""
    if os.geteuid():
        return "needs root, to start slurmd"
    missing_programs = [name for name in PROGRAMS if shutil.which(name) is None]
    return (
        f"needs {', '.join(missing_programs)} (apt install slurmctld slurmd slurm-client munge)"
        if missing_programs
        else ""
    )


class Cluster:
    """A cluster with its files in `base`; commands run in `home`."""

    def __init__(self, base: Path, home: Path) -> None:
        self.base, self.home = base, home
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = {
            **environment,
            "SLURM_CONF": str(base / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}:/usr/sbin",
        }

    def call(self, *arguments: object, check: bool = True, timeout_seconds: float = 60) -> str:
        """Run a command in `home` and return its stdout; with `check`, it must succeed."""
        completed = subprocess.run(
            list(map(str, arguments)),
            cwd=self.home,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        assert not check or completed.returncode == 0, f"{arguments}: {completed.stdout}{completed.stderr}"
        return completed.stdout

    def submit(self, *arguments: object, **environment: str) -> int:
        """Submit a job with sbatch, with additional environment variables; return the id of the job."""
        previous_environment, self.environment = self.environment, {**self.environment, **environment}
        try:
            return int(self.call("sbatch", "--parsable", *arguments))
        finally:
            self.environment = previous_environment

    def read_job(self, job_id: int) -> dict[str, str]:
        """Return the fields that scontrol shows for a job."""
        items = self.call("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(item.split("=", 1) for item in items if "=" in item)

    def wait(self, job_id: int, timeout_seconds: float) -> dict[str, str]:
        """Wait for the end of a job and return its fields; after the timeout raise AssertionError with its log."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            fields = self.read_job(job_id)
            if fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return fields
            assert time.monotonic() < deadline, (
                f"{fields['JobState']} after {timeout_seconds} s:\n{self.read_log(job_id)}"
            )
            time.sleep(0.3)

    def read_log(self, job_id: int) -> str:
        """Return the log of a job; empty if it has none."""
        path = self.home / f"slurm-{job_id}.log"
        return path.read_text() if path.exists() else ""

    def start(self) -> None:
        """Write the configuration, start all daemons, and wait until all nodes are idle."""
        for name in ("state", "log", "munge", *(f"spool-n{node}" for node in range(1, NUM_NODES + 1))):
            (self.base / name).mkdir()
        self.base.chmod(0o755)
        (self.base / "munge").chmod(0o711)
        key = self.base / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port = _find_free_ports(NUM_NODES + 1)
        host = socket.gethostname().split(".")[0]
        names = {
            "base": self.base,
            "host": host,
            "port": port,
            "first": port + 1,
            "last": port + NUM_NODES,
            "nodes": NUM_NODES,
        }
        (self.base / "slurm.conf").write_text(SLURM_CONF.format(**names))
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
        for node in range(1, NUM_NODES + 1):
            self.call("slurmd", "-N", f"n{node}")
        deadline = time.monotonic() + 30
        while self.call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(NUM_NODES):
            assert time.monotonic() < deadline, self.call("sinfo", check=False)
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancel all jobs and stop all daemons."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=10, check=False)
        time.sleep(0.5)
        for path in (*self.base.glob("n*.pid"), self.base / "slurmctld.pid", self.base / "munged.pid"):
            _stop_daemon(path)


def _stop_daemon(path: Path) -> None:
    """Stop the daemon with the process id in this file, with SIGKILL if it does not end within 5 s."""
    try:
        pid = int(path.read_text())
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def _find_free_ports(num_ports: int) -> int:
    """Return the first of `num_ports` consecutive free ports."""
    for first_port in range(17_100, 18_000, 10):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", first_port + offset)) for offset in range(num_ports)):
                return first_port
    raise RuntimeError("no free ports from 17100 to 17999")


@contextmanager
def running_cluster(base: Path, home: Path) -> Iterator[Cluster]:
    """Start a cluster for the block and stop it afterwards."""
    cluster = Cluster(base, home)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
