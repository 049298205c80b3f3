"""`dist-llm submit`: a batch script for Slurm, shown, and handed to sbatch once the config is known to be right."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from dist_llm.errors import ConfigError

SCRIPT = Path(__file__).parent / "slurm" / "train.sbatch"
OPTION, COMMANDS = "#SBATCH ", "set -uo pipefail\n"  # its options, and where its commands begin
ARGUMENTS = '"$@"'


@dataclass(frozen=True)
class Job:
    """What is asked of Slurm. `sweep`: (key, values), of which each combination is a run of an array."""

    config: Path
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    tasks_per_node: int = 1
    options: tuple[str, ...] = ()  # of sbatch, as they are
    sweep: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def runs(self) -> list[tuple[str, ...]]:
        """The overrides of each run; those of a sweep go to directories of their own."""
        if not self.sweep:
            return [self.overrides]
        found = []
        for values in product(*(values for _, values in self.sweep)):
            chosen = [f"{key}={value}" for (key, _), value in zip(self.sweep, values, strict=True)]
            found.append((*self.overrides, *chosen))
        return found


def render(job: Job, directories: Sequence[str]) -> str:
    """The script of a job whose runs have these directories."""
    options = [f"--nodes={job.nodes}", f"--ntasks-per-node={job.tasks_per_node}", *job.options]
    runs = [(str(job.config), *run, f"run.dir={place}") for run, place in zip(job.runs, directories, strict=True)]
    if len(runs) > 1:
        options += [f"--array=0-{len(runs) - 1}", "--output=slurm-%A_%a.log"]
    lines = SCRIPT.read_text().replace(ARGUMENTS, '"${arguments[@]}"').splitlines(keepends=True)
    # sbatch reads options up to the first command; of one that is given twice, the later counts.
    header = max(number for number, line in enumerate(lines) if line.startswith(OPTION)) + 1
    first = lines.index(COMMANDS)
    words = [f"run_{number}=({' '.join(map(shlex.quote, run))})\n" for number, run in enumerate(runs)]
    chosen = 'declare -n arguments="run_${SLURM_ARRAY_TASK_ID:-0}"\n'
    asked = [f"{OPTION}{option}\n" for option in options]
    return "".join([*lines[:header], *asked, *lines[header:first], *words, chosen, *lines[first:]])


def directories(job: Job, base: str) -> list[str]:
    """Where each run goes: `base`, or for those of a sweep a directory in it that is named after its values."""
    if not job.sweep:
        return [base]
    chosen = [run[len(job.overrides) :] for run in job.runs]
    return [f"{base}/{'_'.join(map(_short, values))}" for values in chosen]


def _short(override: str) -> str:
    """`optim.lr=1e-3` -> `lr=1e-3`, fit for a file's name."""
    key, _, value = override.partition("=")
    return f"{key.rpartition('.')[2]}={value.replace('/', '-')}"


def parse_sweep(words: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`optim.lr=1e-3,3e-4` and so on. Raises ConfigError where one is no key with values."""
    found = []
    for word in words:
        key, _, values = word.partition("=")
        every = tuple(filter(None, values.split(",")))
        if not key or not every:
            raise ConfigError(f"--sweep {word}: give a key and its values, as in --sweep optim.lr=1e-3,3e-4")
        found.append((key, every))
    return tuple(found)


def submit(text: str) -> str:
    """Hand it to sbatch. Returns the job's number; raises ConfigError with what sbatch says where it refuses."""
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch is not on PATH: submit from a machine of the cluster, or see the script by --dry-run")
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"sbatch: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
