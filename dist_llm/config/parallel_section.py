"""The config section `parallel`: as a user writes it, and with derived sizes."""

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.section import ALL_RANKS, Limit, PositiveInt, Section, key


class UnresolvedParallelConfig(Section):
    """The keys of `parallel` as a user writes them."""

    dp_replicate: PositiveInt = key("data-parallel replicas, each with a full copy of the (sharded) model", 1)
    dp_shard: Annotated[PositiveInt | None, ALL_RANKS] = key(
        "FSDP2 sharding degree within a replica; null: all ranks that the other dimensions leave", None
    )
    cp: PositiveInt = key("context-parallel degree: each rank has a part of every sequence", 1)
    tp: PositiveInt = key("tensor-parallel degree: each rank has some heads, hidden units and vocabulary rows", 1)
    ep: PositiveInt = key(
        "expert-parallel degree of a mixture of experts: each of ep neighboring ranks has some experts. It divides "
        "dp_shard x cp x tp, and is not a factor of the number of ranks",
        1,
    )
    ep_dispatch: Literal["exact", "padded"] = key(
        "under ep, how many rows a rank sends to each other rank: exactly those that its experts need, for which the "
        "host waits once per layer, or always as many as could be needed, with padding (not run on a GPU)",
        "exact",
    )
    pp: PositiveInt = key("pipeline-parallel degree: each rank has some of the layers", 1)
    reshard: Literal["default", "always", "never"] = key(
        "free gathered weights after forward; default: in all blocks but the last, and never under pp", "default"
    )
    reduce_each_microbatch: bool = key(
        "reduce-scatter gradients after every microbatch: more traffic, but no full gradients in memory", False
    )
    cpu_offload: bool = key("keep sharded weights, gradients and optimizer state in host memory", False)
    sequence_parallel: bool = key(
        "under tp, shard the sequence outside the matrix products (sequence parallelism)", True
    )
    async_tp: bool = key(
        "under tp with compile, on GPUs with peer-to-peer access: overlap collectives with matrix products", False
    )
    pp_schedule: Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = key(
        "pipeline schedule", "1f1b"
    )
    pp_split: Literal["cost", "count"] = key(
        "split the layers into stages of equal cost (with embedding and head), or of equal count", "cost"
    )
    recompute: Literal["none", "full", "selective"] = key(
        "activation checkpointing: drop activations and recompute them in backward; selective keeps matrix "
        "products and attention",
        "none",
    )
    recompute_budget: Annotated[float, Field(ge=0.0, le=1.0)] = key(
        "with compile: share of the activations that a block may keep; activations that are cheap to recompute are "
        "dropped first",
        1.0,
    )
    activations_gib: Limit = key(
        "activation memory in GiB for the blocks of a rank, over all microbatches in flight; each block "
        "recomputes as little as fits",
        None,
    )


class ParallelConfig(UnresolvedParallelConfig):
    """The section `parallel` with the size of each mesh dimension."""

    dp_shard: PositiveInt = 1
