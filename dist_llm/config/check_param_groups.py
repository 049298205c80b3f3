"""Check the rules of optim.groups that need no parameter names.

`dist_llm/optim/param_groups.py` checks the patterns against the names of the model.
"""

from collections.abc import Iterator

from dist_llm.config.derive import SPLIT_BACKWARD
from dist_llm.config.load import Violation
from dist_llm.config.optim_sections import ParamGroup
from dist_llm.config.schema import UnresolvedConfig


def check_param_groups(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of optim.groups: settings without an effect, and frozen parameters that a layout cannot have."""
    groups = config.optim.groups
    for index, group in enumerate(groups):
        section = f"optim.groups.{index}"
        is_last = index == len(groups) - 1
        if is_last and group == ParamGroup(pattern=group.pattern):
            yield Violation(
                (f"{section}.pattern",), "the group changes nothing; set lr_mult, weight_decay_mult or freeze"
            )
        for name in ("lr_mult", "weight_decay_mult"):
            if group.freeze and getattr(group, name) != 1:
                yield Violation(
                    (f"{section}.{name}", f"{section}.freeze"), "has no effect on frozen parameters; remove it"
                )
        if not group.freeze and group.weight_decay_mult != 1 and not config.optim.weight_decay:
            yield Violation(
                (f"{section}.weight_decay_mult", "optim.weight_decay"),
                "has no effect without optim.weight_decay above 0; remove it, or set optim.weight_decay",
            )
        if group.freeze and config.uses_deepspeed:
            yield Violation(
                (f"{section}.freeze", "engine"),
                "DeepSpeed keeps the weights of a run in the partitions of its optimizer, which frozen parameters are "
                "not in, so checkpoints would lack them; set engine=native, or accelerate.plugin=ddp",
            )
        if group.freeze and config.parallel.pp > 1 and config.parallel.pp_schedule in SPLIT_BACKWARD:
            yield Violation(
                (f"{section}.freeze", "parallel.pp_schedule"),
                f"{config.parallel.pp_schedule} computes wrong gradients if a stage has only frozen parameters; set "
                "parallel.pp_schedule to 1f1b, gpipe or interleaved_1f1b",
            )
