"""A private Slurm cluster on this machine for test_slurm.py: a controller, and one slurmd per node of two CPUs.

with running_cluster(tmp_path / "slurm", work_dir=tmp_path) as cluster:
    job_id = cluster.submit("--nodes=2", "script.sbatch")
    fields = cluster.wait(job_id, timeout_seconds=120)
    assert fields["JobState"] == "COMPLETED", cluster.read_log(job_id)
"""

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

REQUIRED_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
NUM_NODES = 2
SLURM_CONF_TEMPLATE = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller_port}
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
NodeName=n[1-{num_nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_node_port}-{last_node_port}] \
CPUs=2 RealMemory=4096 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def find_obstacle() -> str:
    """Return the reason why no cluster can run here; empty if a cluster can run."""
    if os.geteuid():
        return "needs root, to start slurmd"
    missing_programs = [name for name in REQUIRED_PROGRAMS if shutil.which(name) is None]
    if missing_programs:
        return f"needs {', '.join(missing_programs)} (apt install slurmctld slurmd slurm-client munge)"
    return ""


class Cluster:
    """A cluster that keeps its configuration, logs and state in `base`. Commands and jobs run in `work_dir`."""

    def __init__(self, base: Path, work_dir: Path) -> None:
        self.base, self.work_dir = base, work_dir
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = {
            **environment,
            "SLURM_CONF": str(base / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}:/usr/sbin",
        }

    def run_command(self, *arguments: object, check: bool = True, timeout_seconds: float = 60) -> str:
        """Run a command in `work_dir` and return its stdout.

        Raises AssertionError if the command fails and `check` is set.
        """
        completed = subprocess.run(
            list(map(str, arguments)),
            cwd=self.work_dir,
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
            return int(self.run_command("sbatch", "--parsable", *arguments))
        finally:
            self.environment = previous_environment

    def read_job(self, job_id: int) -> dict[str, str]:
        """Return the fields that scontrol shows for a job."""
        items = self.run_command("scontrol", "--oneliner", "show", "job", job_id).split()
        return dict(item.split("=", 1) for item in items if "=" in item)

    def wait(self, job_id: int, *, timeout_seconds: float) -> dict[str, str]:
        """Wait until a job has ended, and return its fields. After the timeout, raise AssertionError with the log."""
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
        path = self.work_dir / f"slurm-{job_id}.log"
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
        controller_port = _find_free_port_range(NUM_NODES + 1)
        settings = {
            "base": self.base,
            "host": socket.gethostname().split(".")[0],
            "controller_port": controller_port,
            "first_node_port": controller_port + 1,
            "last_node_port": controller_port + NUM_NODES,
            "num_nodes": NUM_NODES,
        }
        (self.base / "slurm.conf").write_text(SLURM_CONF_TEMPLATE.format(**settings))
        munge = self.base / "munge"
        self.run_command(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={munge}/munge.socket",
            f"--pid-file={self.base}/munged.pid",
            f"--log-file={self.base}/log/munged.log",
            f"--seed-file={munge}/seed",
        )
        self.run_command("slurmctld", "-c")
        for node in range(1, NUM_NODES + 1):
            self.run_command("slurmd", "-N", f"n{node}")
        deadline = time.monotonic() + 30
        while self.run_command("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != str(NUM_NODES):
            assert time.monotonic() < deadline, self.run_command("sinfo", check=False)
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancel all jobs and stop all daemons."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=10, check=False)
        time.sleep(0.5)
        for path in (*self.base.glob("n*.pid"), self.base / "slurmctld.pid", self.base / "munged.pid"):
            _stop_daemon(path)


def _stop_daemon(path: Path) -> None:
    """Send SIGTERM to the daemon whose PID is in the file `path`, and SIGKILL if it still runs after 5 s."""
    try:
        pid = int(path.read_text())
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        # The state follows the name of the program, which is in parentheses. Z is a zombie, which has already ended.
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def _find_free_port_range(num_ports: int) -> int:
    """Return the first of `num_ports` consecutive free ports."""
    for first_port in range(17_100, 18_000, 10):  # below the ports that Linux assigns to outgoing connections
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", first_port + offset)) for offset in range(num_ports)):
                return first_port
    raise RuntimeError("no free ports from 17100 to 17999")


@contextmanager
def running_cluster(base: Path, *, work_dir: Path) -> Iterator[Cluster]:
    """Start a cluster for the block and stop it afterwards; the arguments are those of `Cluster`."""
    cluster = Cluster(base, work_dir)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
