"""`dist-llm train`: train a model on token shards."""

import argparse
from pathlib import Path

from dist_llm.errors import ConfigError

EPILOG = """\
Set any config key on the command line: run.steps=100 optim.lr=3e-4.
List all keys with types, defaults and descriptions: dist-llm train --help-config [TEXT]
If run.dir contains a checkpoint, the run resumes from it.

  dist-llm train --config configs/demo.yaml run.dir=runs/a run.steps=20
  dist-llm train --debug configs/demo.yaml        one process, a few steps, all checks on
  torchrun --nproc-per-node 2 -m dist_llm train --config configs/demo.yaml parallel.dp_shard=2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dist-llm train`."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a YAML file, or a config of the package such as demo"
    )
    parser.add_argument("--debug", action="store_true", help="one process, eager and deterministic, with all checks")
    parser.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="TEXT",
        help="list all keys, or those that contain TEXT, with type, default and description",
    )
    parser.add_argument(
        "rest", nargs="*", metavar="FILE | key=value", help="the config, without --config; overrides of config keys"
    )


def run(options: argparse.Namespace) -> int:
    """Train. Returns 128 + N if signal N stopped the run, else 0."""
    if options.help_config is not None:
        _print_config_help(options.help_config)
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
    from dist_llm.training.settings import read_config

    if options.debug:
        config = read_config(files[0], [*overrides, *(f"parallel.{axis}=1" for axis in AXES), "data.prefetch=0"], 1)
        from dist_llm.training.debug import debug

        debug(config)
        return 0
    world = read_world()
    config = read_config(files[0], overrides, world.world_size)  # the config is checked before torch is imported
    from torch.distributed.elastic.multiprocessing.errors import record

    from dist_llm.training.run import train

    # `record` passes the exception to torchrun, whose last lines name rank, host and cause.
    stop_signal = record(train)(config, world) or 0
    return 128 + stop_signal if stop_signal else 0


def _print_config_help(text: str) -> None:
    from dist_llm.commands.output import ignore_broken_pipe
    from dist_llm.config.describe import format_help, search_keys

    with ignore_broken_pipe():
        print(*format_help(search_keys(text)), sep="\n")
