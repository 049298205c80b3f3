"""Check the rules of a mixture of experts: its router, its sizes, and what else must be set for it."""

from collections.abc import Iterator

from dist_llm.config.derive import format_divisors
from dist_llm.config.feedforward_sections import GROUPED_WIDTH_MULTIPLE, MoEConfig
from dist_llm.config.load import Violation
from dist_llm.config.schema import UnresolvedConfig

SECTION = "model.feedforward"
OBJECTIVES_WITHOUT_PADDING = ("causal", "prefix")


def check_moe(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of a layer with a mixture of experts that do not depend on the layout."""
    moe = config.model.feedforward
    if not isinstance(moe, MoEConfig):
        return
    yield from _check_router(moe)
    yield from _check_effect(moe)
    for key, size in (("model.d_model", config.model.d_model), (f"{SECTION}.d_expert", moe.d_expert)):
        if size % GROUPED_WIDTH_MULTIPLE:
            yield Violation(
                (key, f"{SECTION}.name"),
                f"{size} is not a multiple of {GROUPED_WIDTH_MULTIPLE}, which grouped matrix products need",
            )
    yield from _check_other_keys(config)


def _check_other_keys(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield a violation for each key outside of the section whose value does not support experts."""
    if config.model.architecture != "decoder":
        yield Violation(
            (f"{SECTION}.name", "model.architecture"),
            f"moe is not supported in an {config.model.architecture}; set architecture=decoder, or remove the section",
        )
    for spec in config.objective.components:
        if spec.name not in OBJECTIVES_WITHOUT_PADDING:
            yield Violation(
                (f"{SECTION}.name", "objective.name"),
                f"moe does not support {spec.name}, whose padding would be routed and counted like text; set "
                f"objective.name={' or '.join(OBJECTIVES_WITHOUT_PADDING)}, or remove the section",
            )
    if config.data.windows != "stream":
        yield Violation(
            (f"{SECTION}.name", "data.windows"),
            f"moe does not support windows={config.data.windows}, whose padding would be routed and counted like text; "
            "set windows=stream, or remove the section",
        )
    if config.engine != "native":
        yield Violation(
            (f"{SECTION}.name", "engine"),
            f"moe needs engine=native (now {config.engine}), which balances the experts once per step; set it, or "
            "remove the section",
        )
    if config.model.parametrization is not None:
        yield Violation(
            ("model.parametrization", f"{SECTION}.name"),
            "the rules of muP and CompleteP do not cover routers and experts; remove the key, or the section",
        )
    if config.fp8:
        yield Violation(
            ("fp8", f"{SECTION}.name"), "grouped matrix products of experts do not support float8; set fp8=false"
        )


def _check_router(moe: MoEConfig) -> Iterator[Violation]:
    if moe.top_k > moe.n_experts:
        yield Violation(
            (f"{SECTION}.top_k", f"{SECTION}.n_experts"),
            f"a token cannot use {moe.top_k} of {moe.n_experts} experts; set at most {moe.n_experts}",
        )
    if moe.n_experts % moe.n_groups:
        yield Violation(
            (f"{SECTION}.n_groups", f"{SECTION}.n_experts"),
            f"{moe.n_experts} experts do not divide into {moe.n_groups} groups; set one of "
            f"{format_divisors(moe.n_experts)}",
        )
    elif moe.top_groups > moe.n_groups:
        yield Violation(
            (f"{SECTION}.top_groups", f"{SECTION}.n_groups"), f"{moe.top_groups} is more than {moe.n_groups} groups"
        )
    elif moe.n_groups > 1 and moe.top_k > moe.top_groups * (moe.n_experts // moe.n_groups):
        yield Violation(
            (f"{SECTION}.top_k", f"{SECTION}.top_groups"),
            f"{moe.top_groups} groups have {moe.top_groups * (moe.n_experts // moe.n_groups)} experts, fewer than "
            f"{moe.top_k}; raise top_groups, or lower top_k",
        )


def _check_effect(moe: MoEConfig) -> Iterator[Violation]:
    """Yield a violation for each key of the section that has no effect."""
    rules = (
        ("top_groups", moe.n_groups > 1, "n_groups above 1"),
        ("balance_over", moe.balance_loss > 0, "balance_loss above 0"),
        ("selection_bias_rate", moe.selection_bias, "selection_bias=true"),
    )
    for name, has_effect, condition in rules:
        value = getattr(moe, name)
        if value != MoEConfig.model_fields[name].default and not has_effect:
            yield Violation(
                (f"{SECTION}.{name}",), f"{value} has no effect without {condition}; remove the key, or set {condition}"
            )


def check_expert_layout(config: UnresolvedConfig, num_ranks: int) -> Iterator[Violation]:
    """Yield violations of a layer with experts under the layout.

    `num_ranks` is dp_shard x cp x tp, the number of ranks over which experts can be spread.
    """
    moe, parallel = config.model.feedforward, config.parallel
    if not isinstance(moe, MoEConfig):
        return
    if num_ranks % parallel.ep:
        yield Violation(
            ("parallel.ep", "parallel.dp_shard", "parallel.cp", "parallel.tp"),
            f"{parallel.ep} does not divide the {num_ranks} ranks of dp_shard x cp x tp; set one of "
            f"{format_divisors(num_ranks)}",
        )
    if moe.n_experts % parallel.ep:
        yield Violation(
            (f"{SECTION}.n_experts", "parallel.ep"),
            f"{moe.n_experts} experts do not divide over ep {parallel.ep}; ep can be {format_divisors(moe.n_experts)}",
        )
    num_slices = parallel.tp * parallel.cp
    if parallel.tp > 1 and not parallel.sequence_parallel and config.data.seq_len % num_slices:
        yield Violation(
            ("data.seq_len", "parallel.tp", "parallel.cp", f"{SECTION}.name"),
            f"{config.data.seq_len} tokens do not divide over tp {parallel.tp} x cp {parallel.cp}, over which a "
            f"mixture of experts splits them; set a multiple of {num_slices}",
        )
