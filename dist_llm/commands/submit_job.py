"""`dist-llm submit`: submit a training run to Slurm."""

import argparse
import sys
from pathlib import Path

from dist_llm.errors import ConfigError

EPILOG = """\
Render a batch script, print it and pass it to sbatch. The config is checked for the number of ranks first.

  dist-llm submit configs/gpt2-xl.yaml run.dir=runs/xl --nodes 16 --tasks-per-node 8 --gpus-per-node 8 --time 24:00:00
  dist-llm submit configs/debug.yaml --sweep optim.lr=1e-3,3e-4 --sweep run.seed=1,2 --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dist-llm submit`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument(
        "config", type=Path, metavar="FILE", help="a YAML file, or a config of the package such as demo"
    )
    parser.add_argument("rest", nargs="*", metavar="key=value", help="overrides of config keys")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes; default: 1")
    parser.add_argument("--tasks-per-node", type=int, default=1, metavar="N", help="ranks per node; default: 1")
    parser.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B", help="job array; repeatable")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="option of sbatch; repeatable")
    parser.add_argument("--time", metavar="LIMIT", help="same as --sbatch=--time=LIMIT")
    parser.add_argument("--gpus-per-node", metavar="N", help="same as --sbatch=--gpus-per-node=N")
    parser.add_argument("--dry-run", action="store_true", help="print the script without submitting it")


def run(options: argparse.Namespace) -> None:
    """Check the config, print the batch script and submit it."""
    from dist_llm.launch.submit import SlurmJob, list_run_directories, parse_sweep, render_batch_script, submit_script
    from dist_llm.training.settings import read_config

    sbatch_options = [
        f"--{name}={value}" for name in ("time", "gpus-per-node") if (value := vars(options)[name.replace("-", "_")])
    ]
    if min(options.nodes, options.tasks_per_node) < 1:
        raise ConfigError(
            f"--nodes {options.nodes}, --tasks-per-node {options.tasks_per_node}: both must be at least 1"
        )
    job = SlurmJob(
        options.config,
        overrides=tuple(options.rest),
        nodes=options.nodes,
        tasks_per_node=options.tasks_per_node,
        sbatch_options=(*sbatch_options, *options.sbatch),
        sweep=parse_sweep(options.sweep),
    )
    configs = [read_config(job.config, overrides, job.num_ranks) for overrides in job.overrides_by_run]
    run_dirs = list_run_directories(job, configs[0].run.dir)
    script = render_batch_script(job, run_dirs)
    print(script)
    if options.dry_run:
        return
    job_id = submit_script(script)
    output = f"slurm-{job_id}{'_*' if job.sweep else ''}.log"
    print(f"job {job_id}; output: {output}; run directories:", *run_dirs, file=sys.stderr)
    print(f"squeue --job {job_id}; scancel {job_id}; tensorboard --logdir {configs[0].run.dir}", file=sys.stderr)
