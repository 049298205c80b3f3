"""The `dist-llm` command. Modules are imported late, so that --help is fast."""

import argparse
import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_llm.errors import ConfigError, UserError, to_user_error

OVERVIEW = """\
Pretrain language models. From raw text to a trained model:

  dist-llm prepare --source python-stdlib --tokenizer bpe:4096 --out data/stdlib
  dist-llm train --config configs/demo.yaml
  dist-llm evaluate --checkpoint runs/demo
  dist-llm generate --checkpoint runs/demo --prompt "def "

The same config runs on several processes, also on several nodes:

  torchrun --nproc-per-node 8 -m dist_llm train --config configs/demo.yaml

Preflight: find bad or slow nodes before a long run. Launch it the same way as train:

  torchrun --nproc-per-node 8 -m dist_llm check --directory runs
"""

TRAIN = """\
Set any config key on the command line: run.steps=100 optim.lr=3e-4.
List all keys with types, defaults and descriptions: dist-llm train --help-config
If run.dir contains a checkpoint, the run resumes from it.

  dist-llm train --config configs/demo.yaml run.dir=runs/a run.steps=20
  dist-llm train --debug configs/demo.yaml        one process, a few steps, all checks on
  torchrun --nproc-per-node 2 -m dist_llm train --config configs/demo.yaml parallel.dp_shard=2
"""

SUBMIT = """\
Render a batch script, print it and pass it to sbatch. The config is checked for the number of ranks first.

  dist-llm submit configs/gpt2-xl.yaml run.dir=runs/xl --nodes 16 --tasks-per-node 8 --gpus-per-node 8 --time 24:00:00
  dist-llm submit configs/debug.yaml --sweep optim.lr=1e-3,3e-4 --sweep run.seed=1,2 --dry-run
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of all commands."""
    from dist_llm.text import adopt_options, options

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("dist-llm", description=OVERVIEW, formatter_class=raw)
    commands = top.add_subparsers(
        dest="command", required=True, metavar="prepare | adopt | check | train | submit | evaluate | generate"
    )

    options.add_arguments(commands.add_parser("prepare", help="tokenize raw text into token shards"))

    adopt = commands.add_parser("adopt", help="make a corpus of token files of other programs, without copying")
    adopt_options.add_arguments(adopt)

    check = commands.add_parser("check", help="preflight: find bad or slow nodes; launch it the same way as train")
    check.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="shared by all nodes; default: the current one"
    )
    check.add_argument("--seconds", type=float, default=60.0, metavar="S", help="time limit; default: 60")

    train = commands.add_parser("train", help="train a model on token shards", epilog=TRAIN, formatter_class=raw)
    train.add_argument("--config", type=Path, metavar="FILE", help="config of the run (YAML)")
    train.add_argument("--debug", action="store_true", help="run one process, eager and deterministic, with all checks")
    train.add_argument("--help-config", action="store_true", help="list all keys with type, default and description")
    train.add_argument(
        "rest", nargs="*", metavar="FILE | key=value", help="the config, without --config; overrides of config keys"
    )

    submit = commands.add_parser("submit", help="submit a training run to Slurm", epilog=SUBMIT, formatter_class=raw)
    submit.add_argument("config", type=Path, metavar="FILE", help="config of the run (YAML)")
    submit.add_argument("rest", nargs="*", metavar="key=value", help="overrides of config keys")
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes; default: 1")
    submit.add_argument("--tasks-per-node", type=int, default=1, metavar="N", help="ranks per node; default: 1")
    submit.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B", help="job array; repeatable")
    submit.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="option of sbatch; repeatable")
    submit.add_argument("--time", metavar="LIMIT", help="same as --sbatch=--time=LIMIT")
    submit.add_argument("--gpus-per-node", metavar="N", help="same as --sbatch=--gpus-per-node=N")
    submit.add_argument("--dry-run", action="store_true", help="print the script without submitting it")

    evaluate = commands.add_parser("evaluate", help="compute loss, perplexity and bits per byte on held-out text")
    evaluate.add_argument("--checkpoint", required=True, metavar="DIR", help="run or checkpoint directory, or URL")
    evaluate.add_argument("--data", metavar="DIR", help="another prepared corpus with the same tokenizer")
    evaluate.add_argument("--split", choices=("heldout", "train"), default="heldout", help="default: heldout")
    evaluate.add_argument(
        "--micro-batch", type=int, default=0, metavar="N", help="sequences per microbatch; default: the run's"
    )
    evaluate.add_argument(
        "--seq-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens per window; default: the run's data.seq_len, or at most 2048 for an imported model",
    )

    generate = commands.add_parser("generate", help="generate text with a trained model")
    generate.add_argument("--checkpoint", required=True, metavar="DIR", help="run or checkpoint directory, or URL")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; default: an empty prompt")
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate; default: 128")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy; default: 1")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="top-p sampling; 1, the default: off")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="top-k sampling; 0, the default: off")
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling; default: 0")
    generate.add_argument("--offload", metavar="DIR", help="on a fast disk: keep the weights beyond --memory there")
    generate.add_argument("--memory", type=float, metavar="GiB", help="with --offload: limit of host memory")
    return top


def run() -> None:
    """Run the command as a process: the entry point of `dist-llm` and `python -m dist_llm`."""
    # Importing torch creates about 300,000 objects and no garbage. Scanning them took a second of a short command.
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    # SIGUSR1, Slurm's warning of the time limit, stays pending until the training loop has installed its handler. Its
    # default action is set to ignore, so that it kills no command through a thread that does not block it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit code 0: success. 1: a bug. 2: a user error. 128 + N: stopped by signal N."""
    options = build_parser().parse_args(arguments)
    commands: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "prepare": _prepare,
        "adopt": _adopt,
        "check": _check,
        "train": _train,
        "submit": _submit,
        "evaluate": _evaluate,
        "generate": _generate,
    }
    try:
        return commands[options.command](options) or 0
    except UserError as error:
        return _report_error(error)
    except OSError as error:
        if (user_error := to_user_error(error)) is None:
            raise
        return _report_error(user_error)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower().startswith("utf"):
            raise  # a bug in our text, not a limit of the terminal
        return _report_error(
            UserError(
                f"standard output uses {error.encoding} and cannot show {error.object[error.start : error.end]!a}; "
                "set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8"
            )
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _report_error(error: UserError) -> int:
    from dist_llm.launch.world import World, read_world

    try:
        world = read_world()
    except ConfigError:
        world = World()  # the rank itself is unknown, so print without a delay
    if not world.main:
        # Usually all ranks fail with the same error and rank 0 reports it: torchrun then ends the other ranks during
        # this pause. A rank that fails alone reports its own error after the pause.
        time.sleep(3)
        print(f"rank {world.rank} on {world.host}:", file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    return 2


def _prepare(options: argparse.Namespace) -> None:
    from dist_llm.text.options import build_options

    if options.merge:
        from dist_llm.text.merge import merge_parts

        merge_parts(options.merge)
        return
    chosen = build_options(options)
    from dist_llm.text.prepare import prepare

    prepare(chosen)


def _adopt(options: argparse.Namespace) -> None:
    from dist_llm.text.adopt import adopt
    from dist_llm.text.adopt_options import build_options

    adopt(build_options(options))


def _check(options: argparse.Namespace) -> None:
    from dist_llm.launch.world import read_world

    world = read_world()
    from dist_llm.launch.preflight import check

    check(options.directory, options.seconds, world)


def _train(options: argparse.Namespace) -> int:
    if options.help_config:
        _print_config_help()
        return 0
    files = [Path(item) for item in options.rest if "=" not in item]
    files += [options.config] if options.config else []
    if len(files) != 1:
        raise ConfigError(
            f"give exactly one config file, not {len(files)}; for example: dist-llm train --config configs/demo.yaml"
        )
    overrides = [item for item in options.rest if "=" in item]
    from dist_llm.config.derive import AXES
    from dist_llm.launch.world import read_world
    from dist_llm.train.settings import read_config

    if options.debug:
        config = read_config(files[0], [*overrides, *(f"parallel.{axis}=1" for axis in AXES), "data.prefetch=0"], 1)
        from dist_llm.train.debug import debug

        debug(config)
        return 0
    world = read_world()
    config = read_config(files[0], overrides, world.size)  # the config is checked before torch is imported
    from torch.distributed.elastic.multiprocessing.errors import record

    from dist_llm.train.run import train

    # `record` passes the exception to torchrun, whose last lines name rank, host and cause.
    stop_signal = record(train)(config, world) or 0
    return 128 + stop_signal if stop_signal else 0


def _submit(options: argparse.Namespace) -> None:
    from dist_llm.launch.submit import Job, directories, parse_sweep, render, submit
    from dist_llm.train.settings import read_config

    sbatch_options = [
        f"--{name}={value}" for name in ("time", "gpus-per-node") if (value := vars(options)[name.replace("-", "_")])
    ]
    sizes = options.nodes, options.tasks_per_node
    if min(sizes) < 1:
        raise ConfigError(f"--nodes {sizes[0]}, --tasks-per-node {sizes[1]}: both must be at least 1")
    job = Job(
        options.config, tuple(options.rest), *sizes, (*sbatch_options, *options.sbatch), parse_sweep(options.sweep)
    )
    configs = [read_config(job.config, run, job.ranks) for run in job.runs]
    run_dirs = directories(job, configs[0].run.dir)
    script = render(job, run_dirs)
    print(script)
    if options.dry_run:
        return
    number = submit(script)
    output = f"slurm-{number}{'_*' if job.sweep else ''}.log"
    print(f"job {number}; output: {output}; run directories:", *run_dirs, file=sys.stderr)
    print(f"squeue --job {number}; scancel {number}; tensorboard --logdir {configs[0].run.dir}", file=sys.stderr)


def _print_config_help() -> None:
    from dist_llm.config.load import describe

    with _ignore_broken_pipe():
        for name, kind, default, description in describe():
            print(f"{name}\n    {kind}; default: {default}\n    {description}")


def _evaluate(options: argparse.Namespace) -> None:
    from dist_llm.launch.world import read_world
    from dist_llm.train.score import Windows, score

    if min(options.micro_batch, options.seq_len) < 0:
        raise ConfigError("--micro-batch and --seq-len: must be at least 1, or 0 for the default")
    windows = Windows(options.seq_len, options.micro_batch)
    score(options.checkpoint, options.data, options.split, windows, read_world())


def _generate(options: argparse.Namespace) -> None:
    from dist_llm.generate import Offload, Sampling, print_continuations

    if (options.offload is None) != (options.memory is None):
        raise ConfigError(
            "--offload and --memory must be set together: weights beyond --memory GiB go to the --offload directory"
        )
    if options.memory is not None and not 0 < options.memory < float("inf"):
        raise ConfigError(f"--memory {options.memory}: must be above 0")
    offload = Offload(Path(options.offload), int(options.memory * 2**30)) if options.offload else None
    sampling = Sampling(options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    with _ignore_broken_pipe():
        print_continuations(options.checkpoint, options.prompt or [""], sampling, offload)


@contextmanager
def _ignore_broken_pipe() -> Iterator[None]:
    """End quietly if the reader of a pipe closes it early (`| head`). For commands that only print."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Redirect the rest of the buffer to /dev/null, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
