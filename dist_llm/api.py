"""The public Python API: the commands of `dist-llm` as functions. `import dist_llm` does not import torch.

    import dist_llm

    dist_llm.prepare("python-stdlib", "data/stdlib", tokenizer="bpe:4096")
    run = dist_llm.train("debug", "run.steps=50")
    print(dist_llm.evaluate(run).loss, dist_llm.generate(run, "def "))

A script that calls `train` or `evaluate` also runs under torchrun. An error that the user can fix is a
`dist_llm.UserError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.errors import DataError, UserError

if TYPE_CHECKING:
    from dist_llm.config.schema import Config
    from dist_llm.data.shard import CorpusManifest, Split
    from dist_llm.generation import LoadedModel
    from dist_llm.training.callback import Callback
    from dist_llm.training.evaluate import Evaluation
    from dist_llm.training.evaluator import Evaluator

__all__ = ["UserError", "evaluate", "generate", "load_model", "prepare", "read_config", "train"]


def prepare(
    source: str | Path | Sequence[str | Path], out: str | Path, tokenizer: str | Path, **options: Any
) -> CorpusManifest:
    """Tokenize raw text into the corpus `out` and return its manifest.

    `options` are the fields of `dist_llm.text.options.PrepareOptions`; the options of `dist-llm prepare` have the same
    names. A script that calls this needs `if __name__ == "__main__"`, because it starts worker processes.

    Raises DataError for an unknown option or a source that cannot be read.
    """
    from dist_llm.text.options import PrepareOptions
    from dist_llm.text.prepare import prepare as prepare_corpus

    sources = [source] if isinstance(source, str | Path) else source
    if unknown_options := sorted(options.keys() - PrepareOptions.__dataclass_fields__.keys()):
        raise DataError(
            f"{unknown_options[0]}: unknown option; there are {', '.join(PrepareOptions.__dataclass_fields__)}"
        )
    return prepare_corpus(
        PrepareOptions(source=tuple(map(str, sources)), tokenizer=str(tokenizer), out=Path(out), **options)
    )


def read_config(config: str | Path | Mapping[str, Any], *overrides: str) -> Config:
    """Load, check and resolve a config for the number of ranks that torchrun started (1 without torchrun).

    `config` is a YAML file, the name of a config of the package such as "demo", or a nested mapping of keys.
    `overrides` have the form `key=value`, as on the command line. Raises one ConfigError with all problems.
    """
    from dist_llm.launch.world import read_world
    from dist_llm.training.settings import read_config as read_resolved_config

    source = config if isinstance(config, Mapping) else Path(config)
    return read_resolved_config(source, overrides, read_world().world_size)


def train(
    config: str | Path | Mapping[str, Any],
    *overrides: str,
    callbacks: Sequence[Callback] = (),
    evaluators: Sequence[Evaluator] = (),
) -> Path:
    """Train, from the latest checkpoint of run.dir if there is one, and return run.dir. For `config` see read_config.

    The trainer calls `callbacks` (dist_llm/training/callback.py) at fixed points of the loop, and `evaluators`
    (dist_llm/training/evaluator.py) every eval.every steps. Every rank must pass the same ones, in the same order.

    Raises UserError if an input is wrong. After signal N, the run is saved and SystemExit(128 + N) is raised.
    """
    from dist_llm.launch.world import read_world

    world = read_world()
    resolved_config = read_config(config, *overrides)
    from dist_llm.training.extensions import Extensions
    from dist_llm.training.run import train as train_run

    if stop_signal := train_run(resolved_config, world, Extensions(tuple(callbacks), tuple(evaluators))):
        raise SystemExit(128 + stop_signal)
    return Path(resolved_config.run.dir)


def evaluate(
    checkpoint: str | Path,
    data: str | Path | None = None,
    split: Split = "heldout",
    seq_len: int = 0,
    micro_batch: int = 0,
) -> Evaluation:
    """Evaluate a checkpoint, or the latest checkpoint of a run, and return the result. Rank 0 also prints the result.

    `data` is a corpus; None selects the corpus of the run. `seq_len` is in tokens per window, `micro_batch` in windows
    per batch; 0 selects the default. Raises ConfigError or DataError.
    """
    from dist_llm.launch.world import read_world
    from dist_llm.training.evaluate_checkpoint import EvaluationOptions, evaluate_checkpoint

    options = EvaluationOptions(seq_len=seq_len, micro_batch=micro_batch)
    return evaluate_checkpoint(str(checkpoint), str(data) if data else None, split, options, read_world())


def generate(
    checkpoint: str | Path,
    prompt: str = "",
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Generate a continuation of `prompt` on one device. The parameters are the options of `dist-llm generate`."""
    from dist_llm.generation import Sampling, encode_prompt, generate_text

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    sampling.check()
    model, tokenizer, config = load_model(checkpoint)
    encoded_prompt = encode_prompt(config, tokenizer, prompt)
    return "".join(generate_text(model, tokenizer, encoded_prompt, sampling, config.model.max_seq_len))


def load_model(checkpoint: str | Path) -> LoadedModel:
    """Load (model, tokenizer, config) of a checkpoint, or of the latest one of a run, on one device."""
    from dist_llm.generation import load_model as load_on_device
    from dist_llm.launch.process_group import select_device
    from dist_llm.launch.world import World

    return load_on_device(checkpoint, select_device(World()))
