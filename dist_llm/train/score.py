"""The `evaluate` command: a checkpoint's loss on a corpus, by however many ranks there are."""

from dist_llm.checkpoint import store
from dist_llm.config.derive import resolve
from dist_llm.config.load import load_saved
from dist_llm.config.schema import ParallelConfig
from dist_llm.data.shard import Split
from dist_llm.data.streams import hides_prompts, open_corpora
from dist_llm.data.tokenizer_file import same_tokenizer
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import DataError
from dist_llm.launch.group import device_of, process_group
from dist_llm.launch.world import World
from dist_llm.objectives.build_objective import build_objective
from dist_llm.train.evaluate import Evaluation, Heldout, evaluate
from dist_llm.train.settings import read_vocabulary


def score(checkpoint: str, data: str | None, split: Split, micro_batch: int, world: World) -> Evaluation:
    """Evaluate and, on rank 0, print. The model is sharded over all ranks, whatever it was trained on."""
    path = store.find(checkpoint, world.rank, world.size)
    config = load_saved(path)
    chosen = config.data.model_copy(update={"path": data, "sources": ()}) if data else config.data
    corpora = open_corpora(chosen, split)
    for corpus in corpora.values():
        if not same_tokenizer(path, corpus.directory, corpus.manifest.tokenizer_sha256):
            raise DataError(f"{corpus.directory}: was prepared with another tokenizer than the one in {path}")
    prompts = hides_prompts(config.data, corpora.values())
    objective = build_objective(config, read_vocabulary(config, path), prompts)
    score_prompts = config.data.score_prompts
    heldout = Heldout(corpora, objective, micro_batch or config.data.micro_batch, score_prompts=score_prompts)
    heldout.check()
    # In bf16 what was trained in float8, on any device, and as `generate` and other tools compute it.
    config = resolve(config.model_copy(update={"parallel": ParallelConfig(), "fp8": False}), world.size, 0)
    device = device_of(world)
    with process_group(world, device):
        engine = NativeEngine(config, device)
        progress = store.load(path, engine.state, moments=False)
        result = evaluate(engine, heldout)
        del engine
    if world.main:
        print(
            f"{path} at step {progress.step}, {split} text of "
            f"{', '.join(str(corpus.directory) for corpus in corpora.values())}: {result.tokens:,} tokens\n"
            f"loss {result.loss:.4f} nats per token\nperplexity {result.perplexity:.3f}"
        )
        for name, loss in result.parts.items():
            print(f"loss of {name} {loss:.4f}")
        if result.bits_per_byte is not None:
            print(f"bits per byte {result.bits_per_byte:.4f}")
    return result
