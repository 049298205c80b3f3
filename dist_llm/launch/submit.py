"""`dist-llm submit`: check the config, then write a Slurm batch script and pass it to sbatch."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from dist_llm.errors import ConfigError

SCRIPT_FILE = Path(__file__).parent / "slurm" / "train.sbatch"
# Text in SCRIPT_FILE that `render_batch_script` searches for.
OPTION = "#SBATCH "
FIRST_COMMAND = "set -uo pipefail\n"
ARGUMENTS = '"$@"'


@dataclass(frozen=True)
class SlurmJob:
    """A Slurm job. `sweep` has pairs (config key, values); each combination of values is one run of a job array."""

    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    options: tuple[str, ...] = ()  # options of sbatch
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def overrides_by_run(self) -> list[tuple[str, ...]]:
        """The overrides `key=value` of each run."""
        if not self.sweep:
            return [self.overrides]
        runs = []
        for values in product(*(values for _, values in self.sweep)):
            assignments = [f"{key}={value}" for (key, _), value in zip(self.sweep, values, strict=True)]
            runs.append((*self.overrides, *assignments))
        return runs


def render_batch_script(job: SlurmJob, directories: Sequence[str]) -> str:
    """Return the batch script of a job. `directories` are the run directories, one per run."""
    options = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}", *job.options]
    runs = [
        (str(job.config), *run, f"run.dir={directory}")
        for run, directory in zip(job.overrides_by_run, directories, strict=True)
    ]
    if len(runs) > 1:
        options += [f"--array=0-{len(runs) - 1}", "--output=slurm-%A_%a.log"]
    lines = SCRIPT_FILE.read_text().replace(ARGUMENTS, '"${arguments[@]}"').splitlines(keepends=True)
    # sbatch reads only options before the first command. If an option is given twice, the last value counts.
    header_end = max(index for index, line in enumerate(lines) if line.startswith(OPTION)) + 1
    first_command = lines.index(FIRST_COMMAND)
    arrays = [f"run_{index}=({' '.join(map(shlex.quote, run))})\n" for index, run in enumerate(runs)]
    select_run = 'declare -n arguments="run_${SLURM_ARRAY_TASK_ID:-0}"\n'
    option_lines = [f"{OPTION}{option}\n" for option in options]
    return "".join(
        [
            *lines[:header_end],
            *option_lines,
            *lines[header_end:first_command],
            *arrays,
            select_run,
            *lines[first_command:],
        ]
    )


def list_run_directories(job: SlurmJob, base: str) -> list[str]:
    """Return the directory of each run: `base`, or in a sweep a subdirectory named after the values of the run."""
    if not job.sweep:
        return [base]
    assignments_by_run = [run[len(job.overrides) :] for run in job.overrides_by_run]
    return [f"{base}/{'_'.join(map(_shorten, assignments))}" for assignments in assignments_by_run]


def _shorten(override: str) -> str:
    """Shorten an override for use in a file name: `optim.lr=1e-3` becomes `lr=1e-3`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value.replace('/', '-')}"


def parse_sweep(options: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Parse --sweep options such as `optim.lr=1e-3,3e-4`. Raises ConfigError if one is not a key with values."""
    sweep = []
    for option in options:
        key, _, values = option.partition("=")
        choices = tuple(filter(None, values.split(",")))
        if not key or not choices:
            raise ConfigError(f"--sweep {option}: give a key and its values, as in --sweep optim.lr=1e-3,3e-4")
        sweep.append((key, choices))
    return tuple(sweep)


def submit_script(script: str) -> str:
    """Pass the script to sbatch and return the job id. Raises ConfigError if sbatch rejects the script."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: submit from a machine of the cluster, or print the script with --dry-run"
        )
    completed = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if completed.returncode:
        raise ConfigError(f"sbatch: {completed.stderr.strip()}")
    return completed.stdout.strip().split(";")[0]
