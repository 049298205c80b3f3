"""Compute the loss of a checkpoint on a corpus, on any number of ranks. `dist-llm evaluate` runs this."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.load_checkpoint import load_checkpoint, read_progress
from dist_llm.config.load import load_saved_config
from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.config.schema import Config
from dist_llm.config.sequence_lengths import compute_component_lengths
from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import Split
from dist_llm.data.streams import has_prompt_weights, open_corpora
from dist_llm.data.tokenizer_file import is_same_tokenizer
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError, DataError
from dist_llm.launch.process_group import process_group, select_device
from dist_llm.launch.world import World
from dist_llm.objectives.build_objective import build_objective
from dist_llm.text.tokenizer import TOKENIZER_FILE
from dist_llm.training.evaluate import Evaluation, EvaluationSetup, evaluate
from dist_llm.training.settings import read_vocabulary

# The default window of an imported model is data.seq_len, its maximum length, but at most this many tokens. Windows of
# 131,072 tokens, for example, would take hours and much memory.
MAX_DEFAULT_SEQ_LEN = 2048


@dataclass(frozen=True)
class EvaluationOptions:
    """Tokens per window (`seq_len`) and windows per batch (`micro_batch`); 0 selects the default."""

    seq_len: int = 0
    micro_batch: int = 0


def evaluate_checkpoint(
    checkpoint: str, data: str | None, split: Split, options: EvaluationOptions, world: World
) -> Evaluation:
    """Evaluate a checkpoint on `data`, or on the corpus of its run, and print the result on rank 0.

    The model is sharded over all ranks, whatever its layout in training was. Raises ConfigError or DataError that names
    the option to change.
    """
    path = fetch_verified_checkpoint(checkpoint, world.rank, world.world_size)
    is_trained = read_progress(CheckpointFolder(path)).tokens > 0  # else the model was imported
    config, seq_len_origin = _resolve_seq_len(load_saved_config(path), options.seq_len, is_trained)
    corpus_origin = f"--data {data}" if data else "the corpus of the run (choose another with --data)"
    corpora = _open_corpora(config, data, split, corpus_origin)
    _check_tokenizer(path, config, corpora.values(), corpus_origin)
    if not (path / TOKENIZER_FILE).exists() and world.is_main:
        print(f"{path} has no tokenizer: using the tokenizer of the corpus")
    weights_prompts = has_prompt_weights(config.data, corpora.values())
    vocabulary = read_vocabulary(config, path if (path / TOKENIZER_FILE).exists() else _first_directory(corpora))
    objective = build_objective(config, vocabulary, weights_prompts)
    prompt_loss_weight = config.data.prompt_loss_weight
    setup = EvaluationSetup(
        corpora, objective, options.micro_batch or config.data.micro_batch, prompt_loss_weight=prompt_loss_weight
    )
    setup.check()
    # Models trained in float8 are scored in bf16 on all devices, as in `generate`.
    config = config.model_copy(update={"parallel": ParallelConfig(dp_shard=world.world_size), "fp8": False})
    device = select_device(world)
    with process_group(world, device):
        engine = NativeEngine(config, device)
        progress = load_checkpoint(path, engine.state, with_moments=False)
        result = evaluate(engine, setup)
        del engine
    if world.is_main:
        print(
            f"{path} at step {progress.step}, {split} text of "
            f"{', '.join(str(corpus.directory) for corpus in corpora.values())} in windows of {config.data.seq_len} "
            f"({seq_len_origin}): {result.tokens:,} tokens\n"
            f"loss {result.loss:.4f} nats per token\nperplexity {result.perplexity:.3f}"
        )
        for name, loss in result.breakdown.items():
            print(f"loss of {name} {loss:.4f}")
        if result.bits_per_byte is not None:
            print(f"bits per byte {result.bits_per_byte:.4f}")
    return result


def _first_directory(corpora: Mapping[str, Corpus]) -> Path:
    """Return the directory of the first corpus. All corpora have the same tokenizer."""
    return next(iter(corpora.values())).directory


def _resolve_seq_len(config: Config, seq_len: int, is_trained: bool) -> tuple[Config, str]:
    """Return (the config for windows of `seq_len` tokens, the origin of the length). 0 selects the default length.

    Raises ConfigError if the model or the objective does not support the length.
    """
    max_seq_len, origin = config.model.max_seq_len, "--seq-len"
    if seq_len > max_seq_len:
        raise ConfigError(f"--seq-len {seq_len}: the model takes at most {max_seq_len} tokens; lower it")
    if not seq_len:
        seq_len, origin = config.data.seq_len, "data.seq_len of the checkpoint"
        if not is_trained and seq_len > MAX_DEFAULT_SEQ_LEN:
            seq_len, origin = MAX_DEFAULT_SEQ_LEN, f"the default; the model takes up to {max_seq_len}, see --seq-len"
    updated = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": seq_len})})
    try:
        compute_component_lengths(updated)
    except ValueError as error:
        raise ConfigError(f"windows of {seq_len} tokens ({origin}): {error}; give a longer --seq-len") from None
    return updated, origin


def _open_corpora(config: Config, data: str | None, split: Split, corpus_origin: str) -> dict[str, Corpus]:
    """Open the corpora of the run, or the corpus of --data. `corpus_origin` says which, for errors."""
    data_config = config.data.model_copy(update={"path": data, "sources": ()}) if data else config.data
    if not (data_config.path or data_config.sources):
        raise ConfigError("--data: this model was imported and has no corpus of its own; give a corpus directory")
    try:
        corpora = open_corpora(data_config, split)
    except DataError as error:
        raise DataError(f"{corpus_origin}: {error}") from None
    for corpus in corpora.values():
        if not corpus.num_tokens:
            raise DataError(
                f"{corpus_origin}: {corpus.directory} has no {split} text; choose another corpus with --data, or "
                f"--split {'train' if split == 'heldout' else 'heldout'}"
            )
        reason = "data.document_mask" if config.data.document_mask else f"data.windows={config.data.windows}"
        needs_document_bounds = config.data.document_mask or config.data.windows == "packed"
        if needs_document_bounds and not corpus.manifest.has_document_bounds:
            raise DataError(
                f"{corpus_origin}: {corpus.directory}: document boundaries are unknown, but the model was trained with "
                f"{reason}; choose a corpus with document boundaries with --data"
            )
    return corpora


def _check_tokenizer(path: Path, config: Config, corpora: Iterable[Corpus], corpus_origin: str) -> None:
    """Raise DataError if the token ids of a corpus are not those of the model."""
    has_tokenizer = (path / TOKENIZER_FILE).exists()
    for corpus in corpora:
        if not has_tokenizer and corpus.manifest.vocab_size > config.model.vocab_size:
            raise DataError(
                f"{corpus_origin}: {corpus.directory} has {corpus.manifest.vocab_size} ids, the model in {path} "
                f"{config.model.vocab_size}; choose a corpus of its tokenizer"
            )
        if has_tokenizer and not is_same_tokenizer(path, corpus.directory, corpus.manifest.tokenizer_sha256):
            raise DataError(
                f"{corpus_origin}: {corpus.directory} was prepared with a different tokenizer from the one in "
                f"{path}; prepare it with --tokenizer {path}"
            )
