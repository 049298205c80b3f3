"""Compute a checkpoint's loss on a corpus, on any number of ranks (`dist-llm evaluate`)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_llm.checkpoint import store
from dist_llm.checkpoint.folder import Folder
from dist_llm.config.derive import resolve
from dist_llm.config.lengths import all_lengths
from dist_llm.config.load import load_saved
from dist_llm.config.schema import Config, ParallelConfig
from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import Split
from dist_llm.data.streams import masks_prompts, open_corpora
from dist_llm.data.tokenizer_file import is_same_tokenizer
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError, DataError
from dist_llm.launch.group import process_group, select_device
from dist_llm.launch.world import World
from dist_llm.objectives.build_objective import build_objective
from dist_llm.text.tokenizer import TOKENIZER_FILE
from dist_llm.training.evaluate import Evaluation, Heldout, evaluate
from dist_llm.training.settings import read_vocabulary

IMPORTED_SEQ_LEN = 2048  # default for imported models, which have no configured length


@dataclass(frozen=True)
class Windows:
    """The number of tokens per window and of windows per batch; 0: the default."""

    seq_len: int = 0
    micro_batch: int = 0


def score(checkpoint: str, data: str | None, split: Split, windows: Windows, world: World) -> Evaluation:
    """Evaluate and print on rank 0. The model is sharded over all ranks, independent of its training layout.

    Raises ConfigError or DataError, which names the option to change.
    """
    path = store.open_checkpoint(checkpoint, world.rank, world.size)
    config, why = _with_seq_len(load_saved(path), windows.seq_len, store.read_progress(Folder(path)).tokens > 0)
    corpora = _open(config, data, split)
    _check_tokenizer(path, config, corpora.values(), world)
    prompts = masks_prompts(config.data, corpora.values())
    vocabulary = read_vocabulary(config, path if (path / TOKENIZER_FILE).exists() else _first_directory(corpora))
    objective = build_objective(config, vocabulary, prompts)
    score_prompts = config.data.score_prompts
    heldout = Heldout(corpora, objective, windows.micro_batch or config.data.micro_batch, score_prompts=score_prompts)
    heldout.check()
    # Models trained in float8 are scored in bf16 on all devices, as in `generate`.
    config = resolve(config.model_copy(update={"parallel": ParallelConfig(), "fp8": False}), world.size, 0)
    device = select_device(world)
    with process_group(world, device):
        engine = NativeEngine(config, device)
        progress = store.load(path, engine.state, moments=False)
        result = evaluate(engine, heldout)
        del engine
    if world.is_main:
        print(
            f"{path} at step {progress.step}, {split} text of "
            f"{', '.join(str(corpus.directory) for corpus in corpora.values())} in windows of {config.data.seq_len} "
            f"({why}): {result.tokens:,} tokens\n"
            f"loss {result.loss:.4f} nats per token\nperplexity {result.perplexity:.3f}"
        )
        for name, loss in result.breakdown.items():
            print(f"loss of {name} {loss:.4f}")
        if result.bits_per_byte is not None:
            print(f"bits per byte {result.bits_per_byte:.4f}")
    return result


def _first_directory(corpora: Mapping[str, Corpus]) -> Path:
    """Return the directory of the first corpus; all have one tokenizer."""
    return next(iter(corpora.values())).directory


def _with_seq_len(config: Config, seq_len: int, trained: bool) -> tuple[Config, str]:
    """Return (the config for windows of `seq_len` tokens, the origin of the number). Raises ConfigError if it is not
    possible."""
    longest, why = config.model.max_seq_len, "--seq-len"
    if seq_len > longest:
        raise ConfigError(f"--seq-len {seq_len}: the model takes at most {longest} tokens; lower it")
    if not seq_len:
        seq_len, why = config.data.seq_len, "as in the run"
        if not trained and seq_len > IMPORTED_SEQ_LEN:
            seq_len, why = IMPORTED_SEQ_LEN, f"the default; the model takes up to {longest}, see --seq-len"
    changed = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": seq_len})})
    try:
        all_lengths(changed)
    except ValueError as error:
        raise ConfigError(f"--seq-len {seq_len}: {error}; raise it") from None
    return changed, why


def _open(config: Config, data: str | None, split: Split) -> dict[str, Corpus]:
    """Open the corpora of the run, or the corpus of --data."""
    chosen = config.data.model_copy(update={"path": data, "sources": ()}) if data else config.data
    whose = f"--data {data}" if data else "the corpus of the run (choose another with --data)"
    if not (chosen.path or chosen.sources):
        raise ConfigError("--data: this model was imported and has no corpus of its own; give a corpus directory")
    try:
        corpora = open_corpora(chosen, split)
    except DataError as error:
        raise DataError(f"{whose}: {error}") from None
    for corpus in corpora.values():
        if not corpus.num_tokens:
            raise DataError(
                f"{whose}: {corpus.directory} has no {split} text; choose another corpus with --data, or "
                f"--split {'train' if split == 'heldout' else 'heldout'}"
            )
        if (config.data.document_mask or config.data.windows == "packed") and not corpus.manifest.has_document_bounds:
            raise DataError(
                f"{whose}: {corpus.directory}: document boundaries are unknown, but the model was trained with a "
                "document mask; choose a corpus with document boundaries"
            )
    return corpora


def _check_tokenizer(path: Path, config: Config, corpora: Iterable[Corpus], world: World) -> None:
    """Raise DataError if the token ids of a corpus are not those of the model."""
    has_tokenizer = (path / TOKENIZER_FILE).exists()
    for corpus in corpora:
        if not has_tokenizer and corpus.manifest.vocab_size > config.model.vocab_size:
            raise DataError(
                f"--data: {corpus.directory} has {corpus.manifest.vocab_size} ids, the model in {path} "
                f"{config.model.vocab_size}; choose a corpus of its tokenizer"
            )
        if has_tokenizer and not is_same_tokenizer(path, corpus.directory, corpus.manifest.tokenizer_sha256):
            raise DataError(
                f"--data: {corpus.directory} was prepared with another tokenizer than the one in {path}; prepare it "
                f"with --tokenizer {path}"
            )
    if not has_tokenizer and world.is_main:
        print(f"{path} has no tokenizer: assuming that of the corpus")
