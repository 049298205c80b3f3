"""The corpora of a run, and the windows that each objective reads of each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from dist_llm.config.check_data import BLOCK, sources_of, starved
from dist_llm.config.lengths import Lengths, all_lengths
from dist_llm.config.schema import Config, DataConfig
from dist_llm.data.corpus import Corpus, Tokens
from dist_llm.data.order import Ints, Mixture, Order, Random, Shuffle
from dist_llm.data.pieces import Pieces, Spans
from dist_llm.data.shard import Split
from dist_llm.data.tokenizer_file import TOKENIZER, same_tokenizer
from dist_llm.errors import DataError
from dist_llm.objectives.examples import TokenWindow


@dataclass(frozen=True)
class Stream:
    """The windows that one objective reads of one corpus, in its order."""

    corpus: Corpus
    order: Order  # sample number -> first token of its window, or with `pieces` the window's number
    window: int
    pieces: Pieces | None = None
    score_prompts: bool = True
    documents: bool = False  # whether windows of a stream come with the number of each token's document

    def read(self, places: Ints) -> Tokens | list[TokenWindow]:
        """What the order's places hold: whole windows of ids [n, window], or texts of their own lengths."""
        if self.pieces is not None:
            return self.pieces.read(places, self.score_prompts)
        return read_windows(self.corpus, places, self.window, self.score_prompts, self.documents)

    @property
    def epoch_windows(self) -> float:
        """Windows that hold as many tokens as there are: with a random order they overlap and leave some out."""
        if self.pieces is not None:
            return self.pieces.count
        return self.order.n_windows if isinstance(self.order, Shuffle) else self.corpus.n_tokens / self.window

    def spans(self, place: int) -> Spans:
        """(first token, tokens) of each piece of text at one of the order's places."""
        return self.pieces.spans(place) if self.pieces is not None else [(place, self.window)]


@dataclass(frozen=True)
class Source:
    """A corpus under its name, with a stream for each member of the objective."""

    name: str
    corpus: Corpus
    streams: tuple[Stream, ...]
    members: Mixture  # which member each of the source's samples is of

    @property
    def epoch_samples(self) -> float:
        """Samples that read the corpus once, all members of the objective together."""
        shares = zip(self.members.quotas, self.streams, strict=True)
        return sum(self.members.quotas) / sum(quota / stream.epoch_windows for quota, stream in shares)


def read_windows(
    corpus: Corpus, starts: Ints, window: int, score_prompts: bool, documents: bool = False
) -> Tokens | list[TokenWindow]:
    """Windows of one stream of text; where prompts are not scored, with what is; on demand with document numbers."""
    rows = corpus.read(starts, window)
    hidden = corpus.manifest.prompts and not score_prompts
    if not hidden and not documents:
        return rows
    none = [None] * len(rows)
    scored = corpus.scored(starts, window) if hidden else none
    numbers = corpus.document_numbers(starts, window) if documents else none
    return [TokenWindow(row, None, *more) for row, *more in zip(rows, scored, numbers, strict=True)]


def open_corpora(data: DataConfig, split: Split = "train") -> dict[str, Corpus]:
    """The corpora by name, in the order of their names, their sizes checked.

    Raises DataError where one is not whole, or made with another tokenizer than the rest.
    """
    found: dict[str, Corpus] = {}
    for source in sorted(sources_of(data), key=lambda each: each.name):
        found[source.name] = corpus = Corpus.of(data.model_copy(update={"path": source.path}), split)
        corpus.check_sizes()
        first = next(iter(found.values()))
        known = corpus.manifest.tokenizer_sha256 == first.manifest.tokenizer_sha256
        compared = (corpus.directory / TOKENIZER).exists()
        if not known and not (compared and same_tokenizer(corpus.directory, first.directory)):
            raise DataError(
                f"{corpus.directory}: was prepared with another tokenizer than {first.directory}; prepare all sources "
                "with the same one"
            )
    return found


def open_sources(config: Config) -> list[Source]:
    """The sources of a resolved config. Raises DataError where one is not whole or too short for a window."""
    data, seed = config.data, config.run.seed
    corpora = open_corpora(data)
    scored = {each.name for each in config.objective.components} - {"causal"}
    found = []
    for name, corpus in corpora.items():
        if scored and hides_prompts(data, [corpus]):
            raise DataError(
                f"{corpus.directory}: has prompts, which {' and '.join(sorted(scored))} cannot leave unscored; set "
                "data.score_prompts to true, or objective.name to causal"
            )
        if data.document_mask or data.windows != "stream":
            corpus.check_document_bounds()
        own = seed_of(seed, name)
        streams = tuple(_stream(data, corpus, own ^ n, size) for n, size in enumerate(all_lengths(config)))
        members = Mixture.of([each.weight for each in config.objective.components], own)
        found.append(Source(name, corpus, streams, members))
    return found


def seed_of(seed: int, name: str) -> int:
    """A source's own seed: its order does not depend on which others there are."""
    return seed ^ (int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 1 if name else 0)


def _stream(data: DataConfig, corpus: Corpus, seed: int, size: Lengths) -> Stream:
    if data.windows == "stream":
        return Stream(
            corpus, build_order(data, corpus, seed, size), size.window, None, data.score_prompts, data.document_mask
        )
    pieces = Pieces(corpus, size, data.windows == "packed")
    if not pieces.count:
        raise DataError(
            f"{corpus.directory}: has no {corpus.split} document with a token to predict; prepare more text"
        )
    order: Order = Random(seed, pieces.count) if data.order == "random" else Shuffle(seed, pieces.count, 1)
    return Stream(corpus, order, size.window, pieces, data.score_prompts)


def build_order(data: DataConfig, corpus: Corpus, seed: int, size: Lengths) -> Order:
    """The order that the config asks for, of windows of `size`. Raises DataError where no window fits."""
    n_windows = corpus.n_windows(size.window, size.stride)
    if n_windows < 1:
        way_out = f"lower seq_len (to make it {corpus.n_tokens} or fewer) or " if corpus.n_tokens > 1 else ""
        raise DataError(
            f"{corpus.directory}: {corpus.n_tokens} {corpus.split} tokens make no window of {size.window}, which "
            f"data.seq_len {data.seq_len} needs; {way_out}prepare more text"
        )
    if data.order == "random":
        return Random(seed, corpus.n_tokens - size.window + 1)
    return Shuffle(seed, n_windows, size.stride)


def weights_of(data: DataConfig, sources: Sequence[Source]) -> list[float]:
    """Share of the samples of each source: as said, or as many as its epochs take. Raises DataError for a tiny one."""
    said = {each.name: each for each in sources_of(data)}
    found = {each.name: said[each.name].weight or said[each.name].epochs * each.corpus.n_tokens for each in sources}
    for message in starved(found):
        raise DataError(f"data.sources: {message}. Give it more epochs, or leave it out")
    return list(found.values())


def hides_prompts(data: DataConfig, corpora: Iterable[Corpus]) -> bool:
    """Whether some tokens are read and not scored."""
    return not data.score_prompts and any(corpus.manifest.prompts for corpus in corpora)


def quotas_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in every BLOCK."""
    return Mixture.of(weights, 0, BLOCK).quotas if len(weights) > 1 else (BLOCK,)
