"""The data sources of a run (named corpora), and the windows that each objective reads from each source.

A window is the tokens of one sample, before the objective turns them into inputs and targets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from dist_llm.config.check_data import SHARE_BLOCK_SAMPLES, find_starved_sources, list_sources
from dist_llm.config.data_sections import DataConfig
from dist_llm.config.schema import Config
from dist_llm.config.sequence_lengths import SequenceLengths, compute_component_lengths
from dist_llm.data.corpus import Corpus
from dist_llm.data.mapped_shard import Tokens
from dist_llm.data.order import Ints, Mixture, Order, RandomOrder, ShuffledOrder
from dist_llm.data.packed_windows import PackedWindows, Spans
from dist_llm.data.shard import Split
from dist_llm.data.tokenizer_file import TOKENIZER_FILE, is_same_tokenizer
from dist_llm.errors import DataError
from dist_llm.objectives.examples import TokenWindow


@dataclass(frozen=True)
class WindowStream:
    """The windows that one objective reads from one corpus, in the order of training."""

    corpus: Corpus
    order: Order  # sample number -> first token of its window or, with `packed_windows`, index of its window
    window_tokens: int
    packed_windows: PackedWindows | None = None
    prompt_loss_weight: float = 1.0
    document_mask: bool = False  # whether windows of kind "stream" include document ids

    def read(self, offsets: Ints) -> Tokens | list[TokenWindow]:
        """Return the windows at these offsets: ids [len(offsets), window_tokens], or TokenWindow objects."""
        if self.packed_windows is not None:
            return self.packed_windows.read(offsets, self.prompt_loss_weight)
        return read_windows(
            self.corpus,
            offsets,
            self.window_tokens,
            prompt_loss_weight=self.prompt_loss_weight,
            document_mask=self.document_mask,
        )

    @property
    def windows_per_epoch(self) -> float:
        """Windows per epoch. With a random order, this is the number of windows with as many tokens as the corpus."""
        if self.packed_windows is not None:
            return self.packed_windows.num_windows
        return (
            self.order.num_windows
            if isinstance(self.order, ShuffledOrder)
            else self.corpus.num_tokens / self.window_tokens
        )

    def get_spans(self, offset: int) -> Spans:
        """Return (first token, number of tokens) of each segment of the window at an offset."""
        return (
            self.packed_windows.get_spans(offset) if self.packed_windows is not None else [(offset, self.window_tokens)]
        )


@dataclass(frozen=True)
class DataSource:
    """A named corpus, with one window stream per component of the objective."""

    name: str
    corpus: Corpus
    streams: tuple[WindowStream, ...]
    component_mixture: Mixture  # assigns the samples of the source to components

    @property
    def samples_per_epoch(self) -> float:
        """Number of samples that read the corpus once, over all components of the objective."""
        quotas = self.component_mixture.quotas
        epochs_per_block = sum(
            quota / stream.windows_per_epoch for quota, stream in zip(quotas, self.streams, strict=True)
        )
        return sum(quotas) / epochs_per_block


def read_windows(
    corpus: Corpus, starts: Ints, window_tokens: int, *, prompt_loss_weight: float, document_mask: bool = False
) -> Tokens | list[TokenWindow]:
    """Read windows of consecutive tokens.

    Return ids [len(starts), window_tokens]; or TokenWindow objects, if the losses of prompts have another weight than 1
    (they have loss weights) or with `document_mask` (they have document ids).
    """
    tokens = corpus.read(starts, window_tokens)
    has_loss_weights = corpus.manifest.prompts and prompt_loss_weight != 1
    if not has_loss_weights and not document_mask:
        return tokens
    none = [None] * len(tokens)
    loss_weights = corpus.compute_loss_weights(starts, window_tokens, prompt_loss_weight) if has_loss_weights else none
    document_ids = corpus.compute_document_ids(starts, window_tokens) if document_mask else none
    return [
        TokenWindow(window, loss_weights_W=weights, document_ids_W=ids)
        for window, weights, ids in zip(tokens, loss_weights, document_ids, strict=True)
    ]


def open_corpora(data: DataConfig, split: Split = "train") -> dict[str, Corpus]:
    """Open the corpora of all sources, sorted by name, and check the sizes of their shards.

    Raises DataError if a corpus is incomplete, or two corpora have different tokenizers.
    """
    corpora: dict[str, Corpus] = {}
    for source in sorted(list_sources(data), key=lambda source: source.name):
        corpora[source.name] = corpus = Corpus.from_config(data.model_copy(update={"path": source.path}), split)
        corpus.check_shard_sizes()
        first_corpus = next(iter(corpora.values()))
        has_equal_hash = corpus.manifest.tokenizer_sha256 == first_corpus.manifest.tokenizer_sha256
        has_tokenizer_file = (corpus.directory / TOKENIZER_FILE).exists()
        if not has_equal_hash and not (
            has_tokenizer_file and is_same_tokenizer(corpus.directory, first_corpus.directory)
        ):
            raise DataError(
                f"{corpus.directory}: was prepared with a different tokenizer from {first_corpus.directory}; prepare "
                "all sources with the same tokenizer"
            )
    return corpora


def open_sources(config: Config) -> list[DataSource]:
    """Open the sources of a resolved config. Raises DataError if a corpus is incomplete or too short for a window."""
    data, seed = config.data, config.run.seed
    corpora = open_corpora(data)
    noncausal_objectives = {component.name for component in config.objective.components} - {"causal"}
    sources = []
    for name, corpus in corpora.items():
        if noncausal_objectives and has_prompt_weights(data, [corpus]):
            raise DataError(
                f"{corpus.directory}: has prompts, and {' and '.join(sorted(noncausal_objectives))} cannot weight "
                "their losses; set data.prompt_loss_weight to 1, or objective.name to causal"
            )
        if data.document_mask or data.windows != "stream":
            corpus.check_document_bounds()
        source_seed = derive_seed(seed, name)
        streams = tuple(
            _build_stream(data, corpus, source_seed ^ component_id, lengths)
            for component_id, lengths in enumerate(compute_component_lengths(config))
        )
        component_mixture = Mixture.from_weights(
            [component.weight for component in config.objective.components], source_seed
        )
        sources.append(DataSource(name, corpus, streams, component_mixture))
    return sources


def derive_seed(seed: int, name: str) -> int:
    """Return the seed of a source. It does not depend on the other sources."""
    return seed ^ (int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 1 if name else 0)


def _build_stream(data: DataConfig, corpus: Corpus, seed: int, lengths: SequenceLengths) -> WindowStream:
    if data.windows == "stream":
        return WindowStream(
            corpus,
            build_order(data, corpus, seed, lengths),
            lengths.window_tokens,
            prompt_loss_weight=data.prompt_loss_weight,
            document_mask=data.document_mask,
        )
    packed_windows = PackedWindows(corpus, lengths, is_packed=data.windows == "packed")
    if not packed_windows.num_windows:
        raise DataError(
            f"{corpus.directory}: has no {corpus.split} document with a token to predict; prepare more text"
        )
    order: Order = (
        RandomOrder(seed, packed_windows.num_windows)
        if data.order == "random"
        else ShuffledOrder(seed, packed_windows.num_windows, stride=1)
    )
    return WindowStream(corpus, order, lengths.window_tokens, packed_windows, data.prompt_loss_weight)


def build_order(data: DataConfig, corpus: Corpus, seed: int, lengths: SequenceLengths) -> Order:
    """Build the order that `data.order` names. Raises DataError if the corpus is shorter than a window."""
    num_windows = corpus.count_windows(lengths.window_tokens, lengths.stride_tokens)
    if num_windows < 1:
        hint = f"lower seq_len (to make it {corpus.num_tokens} or fewer) or " if corpus.num_tokens > 1 else ""
        raise DataError(
            f"{corpus.directory}: {corpus.num_tokens} {corpus.split} tokens are too few for a window of "
            f"{lengths.window_tokens}, which data.seq_len {data.seq_len} needs; {hint}prepare more text"
        )
    if data.order == "random":
        return RandomOrder(seed, corpus.num_tokens - lengths.window_tokens + 1)
    return ShuffledOrder(seed, num_windows, lengths.stride_tokens)


def compute_weights(data: DataConfig, sources: Sequence[DataSource]) -> list[float]:
    """Return the weight of each source as configured, or epochs * tokens. Raises DataError if one is too small."""
    configured = {source.name: source for source in list_sources(data)}
    weights = {
        source.name: configured[source.name].weight or configured[source.name].epochs * source.corpus.num_tokens
        for source in sources
    }
    for message in find_starved_sources(weights):
        raise DataError(f"data.sources: {message}. Give it more epochs, or leave it out")
    return list(weights.values())


def has_prompt_weights(data: DataConfig, corpora: Iterable[Corpus]) -> bool:
    """Return whether the losses of some tokens are weighted, by less than 1, because they are in prompts."""
    return data.prompt_loss_weight != 1 and any(corpus.manifest.prompts for corpus in corpora)


def compute_quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Return how many of SHARE_BLOCK_SAMPLES consecutive samples each source gets."""
    return (
        Mixture.from_weights(weights, seed=0, block_samples=SHARE_BLOCK_SAMPLES).quotas
        if len(weights) > 1
        else (SHARE_BLOCK_SAMPLES,)
    )
