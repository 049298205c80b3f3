"""The public Python API: the commands as functions. `import dist_llm` provides them without importing torch.

    import dist_llm

    dist_llm.prepare("python-stdlib", "data/stdlib", tokenizer="bpe:4096")
    run = dist_llm.train("debug", "run.steps=50")
    print(dist_llm.evaluate(run).loss, dist_llm.generate(run, "def "))

A script that calls `train` or `evaluate` also runs under torchrun, as the commands do. Errors that a user can fix are
`dist_llm.UserError` and its subclasses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.errors import DataError, UserError

if TYPE_CHECKING:
    from dist_llm.config.schema import Config
    from dist_llm.data.shard import Manifest, Split
    from dist_llm.models.decoder import Decoder
    from dist_llm.text.tokenizer import Tokenizer
    from dist_llm.training.evaluate import Evaluation

__all__ = ["UserError", "evaluate", "generate", "load_model", "prepare", "read_config", "train"]


def prepare(
    source: str | Path | Sequence[str | Path], out: str | Path, tokenizer: str | Path, **options: Any
) -> Manifest:
    """Tokenize raw text into the corpus `out` and return its manifest.

    `options` are the fields of `dist_llm.text.options.PrepareOptions`, named as the options of `dist-llm prepare`.
    A script that calls this needs the usual `if __name__ == "__main__"`, because it starts worker processes.

    Raises DataError for a wrong option, and as `dist-llm prepare` does.
    """
    from dist_llm.text.options import PrepareOptions
    from dist_llm.text.prepare import prepare as prepare_corpus

    sources = [source] if isinstance(source, str | Path) else source
    if unknown := sorted(options.keys() - PrepareOptions.__dataclass_fields__.keys()):
        raise DataError(f"{unknown[0]}: unknown option; there are {', '.join(PrepareOptions.__dataclass_fields__)}")
    return prepare_corpus(PrepareOptions(tuple(map(str, sources)), str(tokenizer), Path(out), **options))


def read_config(config: str | Path | Mapping[str, Any], *overrides: str) -> Config:
    """Load, check and resolve a config for the ranks of this process group (1 without torchrun).

    `config` is a YAML file, a config of the package such as "demo", or a nested mapping of keys. `overrides` are
    `key=value`, as on the command line. Raises one ConfigError with all problems.
    """
    from dist_llm.launch.world import read_world
    from dist_llm.training.settings import read_config as read

    source = config if isinstance(config, Mapping) else Path(config)
    return read(source, overrides, read_world().world_size)


def train(config: str | Path | Mapping[str, Any], *overrides: str) -> Path:
    """Train, from the newest checkpoint of run.dir if there is one, and return run.dir. For `config` see read_config.

    Raises SystemExit(128 + N) after signal N, when the run has been saved, and UserError if an input is wrong.
    """
    from dist_llm.launch.world import read_world

    world = read_world()
    resolved = read_config(config, *overrides)
    from dist_llm.training.run import train as train_run

    if stop_signal := train_run(resolved, world):
        raise SystemExit(128 + stop_signal)
    return Path(resolved.run.dir)


def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    split: Split = "heldout",
    seq_len: int = 0,
    micro_batch: int = 0,
) -> Evaluation:
    """Evaluate a checkpoint, or a run's newest, on a corpus (default: its own). Rank 0 also prints the result.

    0 selects the default of `seq_len` and `micro_batch`. Raises ConfigError or DataError.
    """
    from dist_llm.launch.world import read_world
    from dist_llm.training.evaluate_checkpoint import EvaluationOptions, evaluate_checkpoint

    return evaluate_checkpoint(
        str(checkpoint), str(data) if data else None, split, EvaluationOptions(seq_len, micro_batch), read_world()
    )


def generate(
    checkpoint: str | Path,
    prompt: str = "",
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Generate the continuation of `prompt` on one device. The parameters are those of `dist-llm generate`."""
    from dist_llm.generation import Sampling, encode_prompt, generate_text

    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    sampling.check()
    model, tokenizer, config = load_model(checkpoint)
    encoded = encode_prompt(config, tokenizer, prompt)
    return "".join(generate_text(model, tokenizer, encoded, sampling, config.model.max_seq_len))


def load_model(checkpoint: str | Path) -> tuple[Decoder, Tokenizer, Config]:
    """Load the model of a checkpoint, or of a run's newest, on one device, with its tokenizer and config."""
    from dist_llm.generation import load_model as load
    from dist_llm.launch.process_group import select_device
    from dist_llm.launch.world import World

    return load(checkpoint, select_device(World()))
