"""Rules that join keys, the corpus and the world size; and the values that they imply.

`check` finds every violation before a process group exists; `resolve` then fills in each key
that was left to be derived.
"""

import math
from collections.abc import Iterator, Sequence

from dist_llm.config.load import Violation
from dist_llm.config.schema import Config, ModelConfig, ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def check(config: Config, world_size: int, tokenizer_size: int) -> list[Violation]:
    """All broken rules of a run on `world_size` ranks over a corpus with `tokenizer_size` ids."""
    rules = (
        *_check_model(config.model),
        *_check_lengths(config, tokenizer_size),
        *_check_schedule(config),
        *_check_layout(config, world_size),
    )
    return list(rules)


def resolve(config: Config, world_size: int, tokenizer_size: int) -> Config:
    """Replace every "derive it" by its value; `config` must have passed `check`."""
    model, data, parallel = config.model, config.data, config.parallel
    widen = 8 / 3 if model.activation == "swiglu" else 4
    d_ff = model.d_ff or round_up(math.ceil(widen * model.d_model), 64 if model.activation == "swiglu" else 1)
    shard = dp_shard(parallel, world_size)
    ranks = parallel.dp_replicate * shard
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "n_kv_heads": model.n_kv_heads or model.n_heads,
                    "head_dim": model.head_dim or model.d_model // model.n_heads,
                    "d_ff": d_ff,
                    "vocab_size": model.vocab_size or tokenizer_size,
                    "max_seq_len": model.max_seq_len or data.seq_len,
                }
            ),
            "data": data.model_copy(update={"micro_batch": data.micro_batch or data.global_batch // ranks}),
            "parallel": parallel.model_copy(update={"dp_shard": shard}),
            "schedule": config.schedule.model_copy(
                update={"decay_steps": config.schedule.decay_steps or config.run.steps}
            ),
        }
    )


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def dp_shard(parallel: ParallelConfig, world_size: int) -> int:
    """The sharding degree, where -1 takes all that the other axes leave (at least 1)."""
    others = parallel.dp_replicate * parallel.cp * parallel.tp * parallel.pp
    return parallel.dp_shard if parallel.dp_shard > 0 else max(1, world_size // others)


def divisors(number: int) -> str:
    """For messages: `1, 2, 3, 6`, the middle left out where there are many."""
    found = [n for n in range(1, number + 1) if number % n == 0]
    shown: Sequence[int | str] = found if len(found) <= 12 else [*found[:8], "...", *found[-3:]]
    return ", ".join(map(str, shown))


def _check_model(model: ModelConfig) -> Iterator[Violation]:
    if not model.head_dim and model.d_model % model.n_heads:
        yield Violation(
            ("model.n_heads", "model.d_model", "model.head_dim"),
            f"{model.n_heads} heads do not divide d_model {model.d_model}; set n_heads to one of "
            f"{divisors(model.d_model)}, or set model.head_dim",
        )
    elif model.positions == "rope" and (model.head_dim or model.d_model // model.n_heads) % 2:
        yield Violation(
            ("model.n_heads", "model.d_model", "model.head_dim", "model.positions"),
            f"rope turns pairs, but a head has {model.head_dim or model.d_model // model.n_heads} dimensions; "
            "make d_model / n_heads even",
        )
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield Violation(
            ("model.n_kv_heads", "model.n_heads"),
            f"{model.n_kv_heads} key-value heads do not divide {model.n_heads} query heads; "
            f"set one of {divisors(model.n_heads)}",
        )


def _check_lengths(config: Config, tokenizer_size: int) -> Iterator[Violation]:
    vocab, longest = config.model.vocab_size, config.model.max_seq_len
    if vocab and vocab < tokenizer_size:
        yield Violation(
            ("model.vocab_size",),
            f"{vocab} is smaller than the {tokenizer_size} ids of the corpus's tokenizer; "
            f"set at least {tokenizer_size}, or 0 to take it from the corpus",
        )
    if longest and longest < config.data.seq_len:
        yield Violation(
            ("data.seq_len", "model.max_seq_len"),
            f"{config.data.seq_len} is longer than model.max_seq_len {longest}; lower it, or set max_seq_len to 0",
        )


def _check_schedule(config: Config) -> Iterator[Violation]:
    warmup, end = config.schedule.warmup_steps, config.schedule.decay_steps
    # A short trial of a long run (run.steps=20) may well end inside the warm-up: only decay_steps is held to it.
    if end and warmup > end and config.schedule.name != "constant":
        yield Violation(
            ("schedule.warmup_steps", "schedule.decay_steps"),
            f"the warm-up ends at step {warmup}, after the decay does at {end}; set at most {end}",
        )


def _check_layout(config: Config, world_size: int) -> Iterator[Violation]:
    parallel = config.parallel
    if parallel.dp_shard == 0:
        yield Violation(("parallel.dp_shard",), "must be a number of ranks, or -1 for all that the other axes leave")
        return
    for axis in ("cp", "tp", "pp"):
        if getattr(parallel, axis) > 1:
            yield Violation((f"parallel.{axis}",), "this axis is not there yet; set 1")
    shard = dp_shard(parallel, world_size)
    sizes = {axis: shard if axis == "dp_shard" else getattr(parallel, axis) for axis in AXES}
    product = math.prod(sizes.values())
    if product != world_size:
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one rank"
        yield Violation(
            tuple(f"parallel.{axis}" for axis in ("dp_shard", "dp_replicate", "cp", "tp", "pp")),
            f"the layout ({shape}) needs {product} ranks, but {world_size} were started; set dp_shard to -1, "
            f"or start with: torchrun --nproc-per-node {product} -m dist_llm train ...",
        )
        return
    ranks = parallel.dp_replicate * shard
    keys = ("data.global_batch", "data.micro_batch", "parallel.dp_shard", "parallel.dp_replicate")
    unit = ranks * (config.data.micro_batch or 1)
    if config.data.global_batch % unit:
        below, above = config.data.global_batch // unit * unit, round_up(config.data.global_batch, unit)
        nearest = f"{below} or {above}" if below else str(above)
        yield Violation(
            keys,
            f"{config.data.global_batch} sequences do not divide into {ranks} data-parallel ranks "
            f"x micro-batches of {config.data.micro_batch or 1}; the nearest that do: {nearest}",
        )
