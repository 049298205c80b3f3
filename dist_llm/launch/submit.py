"""The functions of `dist-llm submit`: render the batch script of a run or a sweep, and pass it to sbatch."""

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
SBATCH_PREFIX = "#SBATCH "
FIRST_COMMAND_LINE = "set -uo pipefail\n"
ARGUMENTS_PLACEHOLDER = '"$@"'


@dataclass(frozen=True)
class SlurmJob:
    """A Slurm job. `sweep` has pairs (config key, values); each combination of values is one run of a job array."""

    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    sbatch_options: tuple[str, ...] = ()
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def overrides_by_run(self) -> list[tuple[str, ...]]:
        """The overrides `key=value` of each run."""
        if not self.sweep:
            return [self.overrides]
        overrides_by_run = []
        for values in product(*(values for _, values in self.sweep)):
            assignments = [f"{key}={value}" for (key, _), value in zip(self.sweep, values, strict=True)]
            overrides_by_run.append((*self.overrides, *assignments))
        return overrides_by_run


def render_batch_script(job: SlurmJob, run_dirs: Sequence[str]) -> str:
    """Return the batch script of a job. `run_dirs` has the run directory of each run."""
    options = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}", *job.sbatch_options]
    arguments_by_run = [
        (str(job.config), *overrides, f"run.dir={run_dir}")
        for overrides, run_dir in zip(job.overrides_by_run, run_dirs, strict=True)
    ]
    if len(arguments_by_run) > 1:
        options += [f"--array=0-{len(arguments_by_run) - 1}", "--output=slurm-%A_%a.log"]
    lines = SCRIPT_FILE.read_text().replace(ARGUMENTS_PLACEHOLDER, '"${arguments[@]}"').splitlines(keepends=True)
    # sbatch reads only options before the first command, and the last of two values of an option counts. So the options
    # of the job go after those of the template and before any command.
    header_end = max(index for index, line in enumerate(lines) if line.startswith(SBATCH_PREFIX)) + 1
    first_command = lines.index(FIRST_COMMAND_LINE)
    run_assignments = [
        f"run_{index}=({' '.join(map(shlex.quote, arguments))})\n" for index, arguments in enumerate(arguments_by_run)
    ]
    select_run = 'declare -n arguments="run_${SLURM_ARRAY_TASK_ID:-0}"\n'
    option_lines = [f"{SBATCH_PREFIX}{option}\n" for option in options]
    return "".join(
        [
            *lines[:header_end],
            *option_lines,
            *lines[header_end:first_command],
            *run_assignments,
            select_run,
            *lines[first_command:],
        ]
    )


def list_run_directories(job: SlurmJob, run_dir: str) -> list[str]:
    """Return the directory of each run: `run_dir`, or in a sweep a subdirectory named after the values of the run."""
    if not job.sweep:
        return [run_dir]
    assignments_by_run = [overrides[len(job.overrides) :] for overrides in job.overrides_by_run]
    return [f"{run_dir}/{'_'.join(map(_shorten_override, assignments))}" for assignments in assignments_by_run]


def _shorten_override(override: str) -> str:
    """Shorten an override for use in a file name: `optim.lr=1e-3` becomes `lr=1e-3`."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value.replace('/', '-')}"


def parse_sweep(sweep_arguments: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Parse arguments of --sweep such as `optim.lr=1e-3,3e-4`. Raises ConfigError if one is not a key with values."""
    sweep = []
    for argument in sweep_arguments:
        key, _, values = argument.partition("=")
        choices = tuple(filter(None, values.split(",")))
        if not key or not choices:
            raise ConfigError(f"--sweep {argument}: give a key and its values, as in --sweep optim.lr=1e-3,3e-4")
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
