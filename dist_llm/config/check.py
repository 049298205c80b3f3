"""Rules that join keys, the corpus and the world size; and the values that they imply.

`check` finds every violation before a process group exists; `resolve` then fills in each key
that was left to be derived.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_llm.config.check_data import check_data
from dist_llm.config.check_engine import check_axes, check_engine
from dist_llm.config.check_fp8 import check_fp8, check_fp8_sizes
from dist_llm.config.check_guard import check_guard
from dist_llm.config.lengths import extra_ids, inputs_len, lengths
from dist_llm.config.load import Violation
from dist_llm.config.schema import Config, ModelConfig, ObjectiveConfig, ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
FITTING = {
    "decoder": ("causal", "prefix", "span", "fim"),
    "encoder": ("masked",),
    "encoder_decoder": ("prefix", "span"),
}
TWO_STAGE_SCHEDULES = ("interleaved_1f1b", "interleaved_zero_bubble", "zbv")  # each rank holds two stages
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv")  # gradients of activations first, of weights later


@dataclass(frozen=True)
class RefusedLayout(Violation):
    """A broken rule of the layout that also tells, in a line of its own, which layouts would fit."""

    fitting: str

    def __str__(self) -> str:
        return f"{super().__str__()}\n  {self.fitting}"


def check(config: Config, world_size: int, tokenizer_size: int) -> list[Violation]:
    """All broken rules of a run on `world_size` ranks over a corpus with `tokenizer_size` ids."""
    objective = list(_check_objective(config))
    data = list(check_data(config))
    if objective:
        # How long sequences are and how many ids there are follows from the objective: not to be asked of a wrong one.
        config = config.model_copy(
            update={
                "objective": ObjectiveConfig(),
                "model": config.model.model_copy(update={"architecture": "decoder"}),
            }
        )
    rules = [
        *objective,
        *data,
        *_check_model(config.model),
        *_check_relative(config.model),
        *_check_lengths(config, tokenizer_size),
        *_check_schedule(config),
        *_check_checkpoints(config),
        *_check_optim(config),
        *_check_budget(config.parallel),
        *check_guard(config),
        *check_engine(config, world_size),
        *check_fp8(config),
    ]
    layout = list(_check_layout(config, world_size, tokenizer_size))
    if layout and (fitting := nearest_layouts(config, world_size, tokenizer_size)):
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        line = f"parallel: layouts of {ranks} that fit: {'; '.join(map(shape, fitting))}"
        layout[-1] = RefusedLayout(layout[-1].keys, layout[-1].message, line)
    return rules + layout


def nearest_layouts(config: Config, world_size: int, tokenizer_size: int, most: int = 3) -> list[dict[str, int]]:
    """The layouts of `world_size` ranks that break no rule, nearest to the config's first, at most `most`.

    Nearest: with the fewest axes of another size; then with the smallest factors between old and new
    sizes; then with the most data parallelism. A dp_shard of -1 is free to be anything.
    """
    wanted = {axis: size for axis in AXES if (size := getattr(config.parallel, axis)) > 0}

    def distance(sizes: dict[str, int]) -> tuple[int, float, int]:
        factors = [abs(math.log2(sizes[axis] / size)) for axis, size in wanted.items()]
        return sum(factor > 0 for factor in factors), sum(factors), sizes["pp"] * sizes["cp"] * sizes["tp"]

    found: list[dict[str, int]] = []
    for sizes in sorted((dict(zip(AXES, each, strict=True)) for each in _factors(world_size, len(AXES))), key=distance):
        layout = config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})
        if not any(_check_layout(layout, world_size, tokenizer_size)) and not any(check_axes(layout)):
            found.append(sizes)
            if len(found) == most:
                break
    return found


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `number` as a product of `count` numbers, their order minded."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def shape(sizes: dict[str, int]) -> str:
    """`dp_shard 4 x tp 2`: the axes that are used."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "dp_shard 1"


def resolve(config: Config, world_size: int, tokenizer_size: int) -> Config:
    """Replace every "derive it" by its value; `config` must have passed `check`."""
    model, data, parallel = config.model, config.data, config.parallel
    shard = dp_shard(parallel, world_size)
    ranks = parallel.dp_replicate * shard
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "n_encoder_layers": encoder_layers(model),
                    "n_kv_heads": model.n_kv_heads or model.n_heads,
                    "head_dim": model.head_dim or model.d_model // model.n_heads,
                    "d_ff": derived_d_ff(model),
                    "vocab_size": model.vocab_size or tokenizer_size + extra_ids(config),
                    "max_seq_len": model.max_seq_len or max(data.seq_len, inputs_len(config)),
                }
            ),
            "data": data.model_copy(update={"micro_batch": data.micro_batch or data.global_batch // ranks}),
            "parallel": parallel.model_copy(update={"dp_shard": shard}),
            "schedule": config.schedule.model_copy(
                update={"decay_steps": config.schedule.decay_steps or config.run.steps}
            ),
        }
    )


def encoder_layers(model: ModelConfig) -> int:
    """Blocks of an encoder-decoder's encoder; 0 in the other architectures."""
    return (model.n_encoder_layers or model.n_layers) if model.architecture == "encoder_decoder" else 0


def derived_d_ff(model: ModelConfig) -> int:
    """The hidden size that d_ff 0 stands for."""
    if model.d_ff:
        return model.d_ff
    return round_up(math.ceil(8 / 3 * model.d_model), 64) if gated(model) else 4 * model.d_model


def gated(model: ModelConfig) -> bool:
    """Whether the feed-forward has a second projection that the first is multiplied with."""
    return model.activation in ("swiglu", "geglu", "geglu_tanh")


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


def _check_relative(model: ModelConfig) -> Iterator[Violation]:
    sides = 1 if model.architecture == "decoder" else 2
    near = model.relative_buckets // (2 * sides)
    if model.positions == "relative" and (near < 1 or model.relative_distance <= near):
        yield Violation(
            ("model.relative_buckets", "model.relative_distance", "model.positions"),
            f"{model.relative_buckets} buckets tell the first {near} distances apart, of {model.relative_distance}; "
            f"set at least {2 * sides} buckets, and a relative_distance above their number / {2 * sides}",
        )


def _check_objective(config: Config) -> Iterator[Violation]:
    architecture = config.model.architecture
    if config.model.n_encoder_layers and architecture != "encoder_decoder":
        yield Violation(
            ("model.n_encoder_layers", "model.architecture"),
            f"only an encoder_decoder has them; remove the key from this {architecture}",
        )
    for number, each in enumerate(config.objective.members):
        where = f"objective.mixture.{number}" if config.objective.mixture else "objective"
        if each.name not in FITTING[architecture]:
            others = [name for name, fitting in FITTING.items() if each.name in fitting]
            yield Violation(
                (f"{where}.name", "model.architecture"),
                f"{each.name} does not fit model.architecture {architecture}, which learns by "
                f"{' or '.join(FITTING[architecture])}; {each.name} takes {' or '.join(others)}",
            )
            continue
        if each.mode and each.name not in ("prefix", "span"):
            yield Violation((f"{where}.mode", f"{where}.name"), f"{each.name} has no mode token; leave it empty")
        try:
            lengths(each, architecture, config.data.seq_len)
        except ValueError as error:
            yield Violation(("data.seq_len", f"{where}.name"), f"{config.data.seq_len} is too short: {error}")


def _check_lengths(config: Config, tokenizer_size: int) -> Iterator[Violation]:
    vocab, longest, extra = config.model.vocab_size, config.model.max_seq_len, extra_ids(config)
    if vocab and vocab < tokenizer_size + extra:
        more = f" and {extra} of the objective" if extra else ""
        yield Violation(
            ("model.vocab_size",),
            f"{vocab} is smaller than the {tokenizer_size} ids of the corpus's tokenizer{more}; "
            f"set at least {tokenizer_size + extra}, or 0 to derive it",
        )
    needed = max(config.data.seq_len, inputs_len(config))
    if longest and longest < needed:
        yield Violation(
            ("data.seq_len", "model.max_seq_len"),
            f"{needed} is longer than model.max_seq_len {longest}; lower it, or set max_seq_len to 0",
        )


def _check_schedule(config: Config) -> Iterator[Violation]:
    warmup, end = config.schedule.warmup_steps, config.schedule.decay_steps
    # A short trial of a long run (run.steps=20) may well end inside the warm-up: only decay_steps is held to it.
    if end and warmup > end and config.schedule.name in ("cosine", "linear", "wsd"):
        yield Violation(
            ("schedule.warmup_steps", "schedule.decay_steps"),
            f"the warm-up ends at step {warmup}, after the decay does at {end}; set at most {end}",
        )


def _check_optim(config: Config) -> Iterator[Violation]:
    optim = config.optim
    if optim.moments == "bf16" and optim.name == "sgd":
        yield Violation(("optim.moments", "optim.name"), "bf16: sgd has no such moments; set fp32")
    if optim.name == "muon" and config.parallel.cpu_offload:
        yield Violation(
            ("optim.name", "parallel.cpu_offload"), "muon: matrices are not sent from host memory; set adamw, or false"
        )


def _check_checkpoints(config: Config) -> Iterator[Violation]:
    saved, scored = config.checkpoint.every, config.eval.every
    if config.checkpoint.keep_best and (not saved or not scored or saved % scored):
        yield Violation(
            ("checkpoint.keep_best", "checkpoint.every", "eval.every"),
            f"which are best is known of steps that are evaluated too, but eval.every is {scored} and checkpoint.every "
            f"{saved}; set eval.every to a divisor of it",
        )
    if config.init_optimizer == "keep" and not config.init_from:
        yield Violation(
            ("init_optimizer", "init_from"), "there are no moments to keep without init_from; remove the key"
        )


def _check_layout(config: Config, world_size: int, tokenizer_size: int) -> Iterator[Violation]:
    parallel = config.parallel
    if parallel.dp_shard == 0:
        yield Violation(("parallel.dp_shard",), "must be a number of ranks, or -1 for all that the other axes leave")
        return
    sizes = {axis: getattr(parallel, axis) for axis in AXES} | {"dp_shard": dp_shard(parallel, world_size)}
    product = math.prod(sizes.values())
    if product != world_size:
        yield Violation(
            tuple(f"parallel.{axis}" for axis in ("dp_shard", "dp_replicate", "cp", "tp", "pp")),
            f"the layout ({shape(sizes)}) needs {product} ranks, but {world_size} were started; set dp_shard to -1, "
            f"or start with: torchrun --nproc-per-node {product} -m dist_llm train ...",
        )
    yield from _check_batch(config, sizes["dp_replicate"] * sizes["dp_shard"])
    yield from _check_tensor(config, tokenizer_size)
    yield from check_fp8_sizes(config, derived_d_ff(config.model))
    yield from _check_context(config)
    yield from _check_pipeline(config, sizes["dp_replicate"] * sizes["dp_shard"])


def _check_budget(parallel: ParallelConfig) -> Iterator[Violation]:
    if parallel.activations_gib and parallel.recompute != "none":
        yield Violation(
            ("parallel.activations_gib", "parallel.recompute"),
            "the budget chooses what each block computes again; set recompute to none, or activations_gib to 0",
        )


def _check_batch(config: Config, ranks: int) -> Iterator[Violation]:
    micro, batch = config.data.micro_batch or 1, config.data.global_batch
    unit = ranks * micro
    if batch % unit:
        nearest = f"{batch // unit * unit} or {round_up(batch, unit)}" if batch > unit else str(unit)
        yield Violation(
            ("data.global_batch", "data.micro_batch", "parallel.dp_shard", "parallel.dp_replicate"),
            f"{batch} sequences do not divide into {ranks} data-parallel ranks x micro-batches of {micro}; "
            f"the nearest that do: {nearest}",
        )


def _check_tensor(config: Config, tokenizer_size: int) -> Iterator[Violation]:
    model, tp = config.model, config.parallel.tp
    d_ff = derived_d_ff(model)
    rows = round_up(model.vocab_size or tokenizer_size + extra_ids(config), model.vocab_multiple)
    split = (
        (("model.n_heads",), "query heads", model.n_heads),
        (("model.n_kv_heads", "model.n_heads"), "key-value heads", model.n_kv_heads or model.n_heads),
        (("model.d_ff", "model.d_model"), "hidden units", d_ff),
        (("model.vocab_multiple",), "vocabulary rows", rows),
    )
    for keys, what, number in split:
        if number % tp:
            yield Violation(
                (*keys, "parallel.tp"), f"{number} {what} do not divide over tp {tp}; tp can be {divisors(number)}"
            )
    # The lengths of an encoder-decoder's second sequence are made to fit.
    if tp > 1 and config.parallel.sequence_parallel and config.data.seq_len % (tp * config.parallel.cp):
        yield Violation(
            ("data.seq_len", "parallel.tp", "parallel.cp", "parallel.sequence_parallel"),
            f"{config.data.seq_len} tokens do not divide over tp {tp} x cp {config.parallel.cp}; "
            f"set a multiple of {tp * config.parallel.cp}, or sequence_parallel to false",
        )
    if tp > 1 and config.parallel.async_tp and not (config.compile and config.parallel.sequence_parallel):
        yield Violation(
            ("parallel.async_tp", "compile", "parallel.sequence_parallel"),
            "the compiler overlaps the all-gathers and reduce-scatters of sequence_parallel; set compile and "
            "sequence_parallel to true, or async_tp to false",
        )
    selects = config.parallel.recompute == "selective" or config.parallel.activations_gib
    if tp > 1 and not config.parallel.sequence_parallel and config.compile and selects and model.dropout:
        yield Violation(
            ("parallel.recompute", "parallel.activations_gib", "compile", "parallel.sequence_parallel"),
            "a compiled block that keeps a selection cannot draw the dropout of a rank's own heads; set "
            "sequence_parallel to true, or compile to false, or recompute to full and activations_gib to 0",
        )


def _check_context(config: Config) -> Iterator[Violation]:
    pieces, length = 2 * config.parallel.cp, config.data.seq_len
    if config.parallel.cp > 1 and config.model.architecture == "encoder_decoder":
        yield Violation(
            ("parallel.cp", "model.architecture"),
            "an encoder_decoder's sequences are not split over context ranks; set cp to 1",
        )
    if config.parallel.cp > 1 and length % pieces:
        nearest = f"{length // pieces * pieces} or {round_up(length, pieces)}" if length > pieces else str(pieces)
        yield Violation(
            ("data.seq_len", "parallel.cp"),
            f"{length} tokens do not divide into the {pieces} pieces of cp {config.parallel.cp} "
            f"(two a rank); the nearest that do: {nearest}",
        )


def _check_pipeline(config: Config, ranks: int) -> Iterator[Violation]:
    parallel, data = config.parallel, config.data
    if parallel.pp == 1:
        return
    stages = parallel.pp * (2 if parallel.pp_schedule in TWO_STAGE_SCHEDULES else 1)
    blocks = config.model.n_layers + encoder_layers(config.model)
    if blocks < stages:
        yield Violation(
            ("parallel.pp", "model.n_layers", "parallel.pp_schedule"),
            f"{stages} stages ({parallel.pp_schedule}) need as many blocks, but the model has {blocks}; "
            f"pp can be at most {blocks * parallel.pp // stages or 1}",
        )
    if config.model.architecture == "encoder_decoder" and parallel.pp_schedule in SPLIT_BACKWARD:
        yield Violation(
            ("parallel.pp_schedule", "model.architecture"),
            f"{parallel.pp_schedule} splits backward in two, which torch cannot do where the encoder's output is "
            "handed on and used, too; set pp_schedule to 1f1b, gpipe or interleaved_1f1b",
        )
    if config.model.positions == "relative":
        yield Violation(
            ("parallel.pp", "model.positions"),
            "the layers share one table of relative positions, which cannot be on several stages; set pp to 1, or "
            "positions to rope, learned or sinusoidal",
        )
    microbatches = data.global_batch // ranks // (data.micro_batch or max(1, data.global_batch // ranks))
    # Interleaved schedules go round the ranks in whole turns.
    whole = parallel.pp_schedule.startswith("interleaved")
    least = 1 if parallel.pp_schedule == "gpipe" else stages if parallel.pp_schedule == "zbv" else parallel.pp
    if microbatches < least or (whole and microbatches % parallel.pp):
        rule = f"a multiple of pp {parallel.pp}" if whole else f"at least {least}"
        yield Violation(
            ("data.micro_batch", "data.global_batch", "parallel.pp", "parallel.pp_schedule"),
            f"{microbatches} microbatches for {parallel.pp_schedule} over pp {parallel.pp}, which takes {rule}; "
            "lower micro_batch or raise global_batch (microbatches = global_batch / data ranks / micro_batch)",
        )
    if parallel.reduce_each_microbatch:
        yield Violation(
            ("parallel.reduce_each_microbatch", "parallel.pp"),
            "a pipeline's schedule reduces once, after its last microbatch; set it to false, or pp to 1",
        )
    if config.compile and parallel.pp_schedule in SPLIT_BACKWARD:
        yield Violation(
            ("parallel.pp_schedule", "compile"),
            f"{parallel.pp_schedule} splits backward in two, which torch cannot do with compiled blocks; "
            "set compile to false, or pp_schedule to 1f1b or interleaved_1f1b",
        )
    if parallel.recompute == "selective" and parallel.pp_schedule in SPLIT_BACKWARD:
        yield Violation(
            ("parallel.recompute", "parallel.pp_schedule"),
            f"{parallel.pp_schedule} goes backward through a block twice, but what selective keeps is there once; "
            "set recompute to full or none, or pp_schedule to 1f1b or interleaved_1f1b",
        )
