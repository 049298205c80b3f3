"""`dist-llm submit`: check the config, then write a Slurm batch script and pass it to sbatch."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from dist_llm.errors import ConfigError

SCRIPT = Path(__file__).parent / "slurm" / "train.sbatch"
OPTION = "#SBATCH "
FIRST_COMMAND = "set -uo pipefail\n"
ARGUMENTS = '"$@"'


@dataclass(frozen=True)
class SlurmJob:
    """A Slurm job. `sweep`: (key, values); each combination is one run of a job array."""

    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    options: tuple[str, ...] = ()  # passed to sbatch unchanged
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def overrides_by_run(self) -> list[tuple[str, ...]]:
        """The dotted overrides of each run."""
        if not self.sweep:
            return [self.overrides]
        runs = []
        for values in product(*(values for _, values in self.sweep)):
            chosen = [f"{key}={value}" for (key, _), value in zip(self.sweep, values, strict=True)]
            runs.append((*self.overrides, *chosen))
        return runs


def render_batch_script(job: SlurmJob, directories: Sequence[str]) -> str:
    """Return the batch script of a job whose runs write to `directories`."""
    options = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}", *job.options]
    runs = [
        (str(job.config), *run, f"run.dir={directory}")
        for run, directory in zip(job.overrides_by_run, directories, strict=True)
    ]
    if len(runs) > 1:
        options += [f"--array=0-{len(runs) - 1}", "--output=slurm-%A_%a.log"]
    lines = SCRIPT.read_text().replace(ARGUMENTS, '"${arguments[@]}"').splitlines(keepends=True)
    # sbatch reads options before the first command only; the last value of an option wins.
    header = max(number for number, line in enumerate(lines) if line.startswith(OPTION)) + 1
    first = lines.index(FIRST_COMMAND)
    arrays = [f"run_{number}=({' '.join(map(shlex.quote, run))})\n" for number, run in enumerate(runs)]
    chosen = 'declare -n arguments="run_${SLURM_ARRAY_TASK_ID:-0}"\n'
    extra = [f"{OPTION}{option}\n" for option in options]
    return "".join([*lines[:header], *extra, *lines[header:first], *arrays, chosen, *lines[first:]])


def run_directories(job: SlurmJob, base: str) -> list[str]:
    """Return the directory of each run: `base`, or in a sweep a subdirectory named after the run's values."""
    if not job.sweep:
        return [base]
    chosen = [run[len(job.overrides) :] for run in job.overrides_by_run]
    return [f"{base}/{'_'.join(map(_short, values))}" for values in chosen]


def _short(override: str) -> str:
    """Shorten an override for use in a file name: `optim.lr=1e-3` becomes `lr=1e-3`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value.replace('/', '-')}"


def parse_sweep(options: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Parse `optim.lr=1e-3,3e-4`. Raises ConfigError for a word that is not a key with values."""
    sweep = []
    for word in options:
        key, _, values = word.partition("=")
        choices = tuple(filter(None, values.split(",")))
        if not key or not choices:
            raise ConfigError(f"--sweep {word}: give a key and its values, as in --sweep optim.lr=1e-3,3e-4")
        sweep.append((key, choices))
    return tuple(sweep)


def submit_script(text: str) -> str:
    """Pass the script to sbatch. Returns the job id; raises ConfigError with the message of sbatch if it refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: submit from a machine of the cluster, or print the script with --dry-run"
        )
    completed = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    if completed.returncode:
        raise ConfigError(f"sbatch: {completed.stderr.strip()}")
    return completed.stdout.strip().split(";")[0]
