"""The data sources of a run, and the windows that each objective reads from each source."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from dist_llm.config.check_data import BLOCK, list_sources, starved
from dist_llm.config.data_sections import DataConfig
from dist_llm.config.lengths import Lengths, all_lengths
from dist_llm.config.schema import Config
from dist_llm.data.corpus import Corpus, Tokens
from dist_llm.data.order import Ints, Mixture, Order, RandomOrder, ShuffledOrder
from dist_llm.data.packed_windows import PackedWindows, Spans
from dist_llm.data.shard import Split
from dist_llm.data.tokenizer_file import TOKENIZER, same_tokenizer
from dist_llm.errors import DataError
from dist_llm.objectives.examples import TokenWindow


@dataclass(frozen=True)
class WindowStream:
    """The windows that one objective reads from one corpus, in its order."""

    corpus: Corpus
    order: Order  # sample number -> first token of its window or, with `packed_windows`, index of the window
    window: int
    packed_windows: PackedWindows | None = None
    score_prompts: bool = True
    document_mask: bool = False  # whether windows of kind "stream" include document ids

    def read(self, offsets: Ints) -> Tokens | list[TokenWindow]:
        """Return the windows at these offsets: ids [n, window], or windows of varying lengths."""
        if self.packed_windows is not None:
            return self.packed_windows.read(offsets, self.score_prompts)
        return read_windows(self.corpus, offsets, self.window, self.score_prompts, self.document_mask)

    @property
    def epoch_windows(self) -> float:
        """Windows per epoch. With a random order: windows that have as many tokens as the corpus."""
        if self.packed_windows is not None:
            return self.packed_windows.count
        return self.order.num_windows if isinstance(self.order, ShuffledOrder) else self.corpus.n_tokens / self.window

    def spans(self, offset: int) -> Spans:
        """Return (first token, number of tokens) of each segment of the window at an offset."""
        return self.packed_windows.spans(offset) if self.packed_windows is not None else [(offset, self.window)]


@dataclass(frozen=True)
class DataSource:
    """A named corpus, with one window stream per component of the objective."""

    name: str
    corpus: Corpus
    streams: tuple[WindowStream, ...]
    component_mixture: Mixture  # assigns the source's samples to components

    @property
    def epoch_samples(self) -> float:
        """Samples that read the corpus once, summed over the components of the objective."""
        quotas = zip(self.component_mixture.quotas, self.streams, strict=True)
        return sum(self.component_mixture.quotas) / sum(quota / stream.epoch_windows for quota, stream in quotas)


def read_windows(
    corpus: Corpus, starts: Ints, window: int, score_prompts: bool, document_mask: bool = False
) -> Tokens | list[TokenWindow]:
    """Read windows of consecutive text, with loss masks if prompts have no loss, and with document ids on demand."""
    rows = corpus.read(starts, window)
    has_unscored = corpus.manifest.prompts and not score_prompts
    if not has_unscored and not document_mask:
        return rows
    none = [None] * len(rows)
    loss_masks = corpus.compute_loss_mask(starts, window) if has_unscored else none
    document_ids = corpus.compute_document_ids(starts, window) if document_mask else none
    return [TokenWindow(row, None, *more) for row, *more in zip(rows, loss_masks, document_ids, strict=True)]


def open_corpora(data: DataConfig, split: Split = "train") -> dict[str, Corpus]:
    """Open the corpora, sorted by name, and check the sizes of their shards.

    Raises DataError if one is incomplete or has another tokenizer than the rest.
    """
    corpora: dict[str, Corpus] = {}
    for source in sorted(list_sources(data), key=lambda named: named.name):
        corpora[source.name] = corpus = Corpus.from_config(data.model_copy(update={"path": source.path}), split)
        corpus.check_shard_sizes()
        first = next(iter(corpora.values()))
        known = corpus.manifest.tokenizer_sha256 == first.manifest.tokenizer_sha256
        compared = (corpus.directory / TOKENIZER).exists()
        if not known and not (compared and same_tokenizer(corpus.directory, first.directory)):
            raise DataError(
                f"{corpus.directory}: was prepared with another tokenizer than {first.directory}; prepare all sources "
                "with the same tokenizer"
            )
    return corpora


def open_sources(config: Config) -> list[DataSource]:
    """Open the sources of a resolved config. Raises DataError if one is incomplete or too short for a window."""
    data, seed = config.data, config.run.seed
    corpora = open_corpora(data)
    noncausal = {component.name for component in config.objective.components} - {"causal"}
    sources = []
    for name, corpus in corpora.items():
        if noncausal and masks_prompts(data, [corpus]):
            raise DataError(
                f"{corpus.directory}: has prompts, which {' and '.join(sorted(noncausal))} cannot leave unscored; set "
                "data.score_prompts to true, or objective.name to causal"
            )
        if data.document_mask or data.windows != "stream":
            corpus.check_document_bounds()
        source_seed = derive_seed(seed, name)
        streams = tuple(
            _build_stream(data, corpus, source_seed ^ n, size) for n, size in enumerate(all_lengths(config))
        )
        component_mixture = Mixture.from_weights(
            [component.weight for component in config.objective.components], source_seed
        )
        sources.append(DataSource(name, corpus, streams, component_mixture))
    return sources


def derive_seed(seed: int, name: str) -> int:
    """Return the seed of a source. It does not depend on the other sources."""
    return seed ^ (int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 1 if name else 0)


def _build_stream(data: DataConfig, corpus: Corpus, seed: int, size: Lengths) -> WindowStream:
    if data.windows == "stream":
        return WindowStream(
            corpus, build_order(data, corpus, seed, size), size.window, None, data.score_prompts, data.document_mask
        )
    packed_windows = PackedWindows(corpus, size, data.windows == "packed")
    if not packed_windows.count:
        raise DataError(
            f"{corpus.directory}: has no {corpus.split} document with a token to predict; prepare more text"
        )
    order: Order = (
        RandomOrder(seed, packed_windows.count)
        if data.order == "random"
        else ShuffledOrder(seed, packed_windows.count, 1)
    )
    return WindowStream(corpus, order, size.window, packed_windows, data.score_prompts)


def build_order(data: DataConfig, corpus: Corpus, seed: int, size: Lengths) -> Order:
    """Build the order that `data.order` names, for windows of `size`. Raises DataError if no window fits."""
    num_windows = corpus.count_windows(size.window, size.stride)
    if num_windows < 1:
        hint = f"lower seq_len (to make it {corpus.n_tokens} or fewer) or " if corpus.n_tokens > 1 else ""
        raise DataError(
            f"{corpus.directory}: {corpus.n_tokens} {corpus.split} tokens are too few for a window of {size.window}, "
            f"which data.seq_len {data.seq_len} needs; {hint}prepare more text"
        )
    if data.order == "random":
        return RandomOrder(seed, corpus.n_tokens - size.window + 1)
    return ShuffledOrder(seed, num_windows, size.stride)


def compute_weights(data: DataConfig, sources: Sequence[DataSource]) -> list[float]:
    """Return the weight of each source: as configured, or epochs times tokens. Raises DataError for a tiny weight."""
    configured = {source.name: source for source in list_sources(data)}
    weights = {
        source.name: configured[source.name].weight or configured[source.name].epochs * source.corpus.n_tokens
        for source in sources
    }
    for message in starved(weights):
        raise DataError(f"data.sources: {message}. Give it more epochs, or leave it out")
    return list(weights.values())


def masks_prompts(data: DataConfig, corpora: Iterable[Corpus]) -> bool:
    """Return whether some tokens have no loss because they are in prompts."""
    return not data.score_prompts and any(corpus.manifest.prompts for corpus in corpora)


def compute_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the samples of each source per BLOCK."""
    return Mixture.from_weights(weights, 0, BLOCK).quotas if len(weights) > 1 else (BLOCK,)
