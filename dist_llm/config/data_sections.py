"""The config section `data`: the keys that a user writes, the same keys with derived values, and the entries of lists.

A sample is one training example, and its window is the tokens that it reads from a corpus. The objective turns the
window into a sequence, which is one row of a batch. So a batch has as many sequences as samples.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dist_llm.config.section import (
    ZERO_TO_NULL,
    DerivedPositiveInt,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RenamedKey,
    Section,
    StepInterval,
    key,
)

CACHE = "~/.cache/dist_llm"  # default directory for downloads


class SourceConfig(Section):
    """One of several corpora."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = key("name in metrics and weights")
    path: str = key("see data.path")
    weight: Annotated[PositiveFloat | None, ZERO_TO_NULL] = key("share of the samples; null: use epochs", None)
    epochs: PositiveFloat = key(
        "if no source has a weight: passes over this source, for one pass over a source with epochs 1", 1.0
    )


class StageConfig(Section):
    """Source weights that apply after a number of training tokens."""

    from_tokens: PositiveInt = key("number of tokens after which these weights apply")
    weights: dict[str, NonNegativeFloat] = key("weight of each source, by name; 0: no samples of the source")


class UnresolvedDataConfig(Section):
    """The keys of `data` as a user writes them."""

    RENAMED_KEYS: ClassVar = {"score_prompts": RenamedKey("prompt_loss_weight", bool, float)}

    path: str = key(
        "corpus directory made by `dist-llm prepare` or `dist-llm adopt`, or its URL; empty: use sources", ""
    )
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = key(
        "several corpora instead of path, each with a name, a path, and a weight or a number of epochs", ()
    )
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = key(
        "source weights that change during the run: from_tokens and weights by source name", ()
    )
    cache: str = key("directory for downloaded shards, one copy per content; nothing is ever removed", CACHE)
    seq_len: PositiveInt = key("tokens per training sequence")
    global_batch: PositiveInt = key("sequences per optimizer step, over all ranks")
    micro_batch: DerivedPositiveInt = key(
        "sequences per forward pass of one rank; null: all sequences of the rank at once", None
    )
    order: Literal["shuffle", "random"] = key(
        "shuffle: each window once per epoch; random: uniform offsets with replacement", "shuffle"
    )
    windows: Literal["stream", "document", "packed"] = key(
        "stream: cut the token stream into windows; document: one padded document per window; packed: whole documents "
        "per window, each masked from the others",
        "stream",
    )
    prompt_loss_weight: Annotated[float, Field(ge=0.0, le=1.0)] = key(
        "weight of the losses of prompt tokens, in a corpus that was prepared with --prompt-key; 0: no loss, 1: as all "
        "other tokens",
        0.0,
    )
    document_mask: bool = key("restrict attention to tokens of the same document; positions restart in each", False)
    verify: Literal["size", "hash"] = key(
        "check of the shards at the start: compare sizes, or read all bytes and compare hashes", "size"
    )
    prefetch: NonNegativeInt = key("number of steps whose batches a thread prepares in advance; 0: none", 2)
    skip: Annotated[
        tuple[Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)], ...], Field(strict=False)
    ] = key("ranges [from, to) of sample numbers to leave out, for example the samples of a loss spike", ())
    on_change: Literal["refuse", "new_segment"] = key(
        "if a resumed run has another corpus, seed, window or objective: refuse to resume; or new_segment: use the new "
        "data from this step on",
        "refuse",
    )
    audit_every: StepInterval = key(
        "steps between checks that the ranks read the planned samples; a sample read twice or not at all ends the run",
        100,
    )


class DataConfig(UnresolvedDataConfig):
    """The section `data` of a run. Values that depend on the number of ranks are set."""

    micro_batch: PositiveInt
