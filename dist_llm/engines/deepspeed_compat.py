"""The private interfaces of DeepSpeed that the DeepSpeed engine uses. Only this module may use private interfaces.

The interfaces match DeepSpeed 0.19; `tests/test_compat.py` checks each of them in the installed version. The functions
take objects of DeepSpeed, so this module does not import DeepSpeed.
"""

from typing import Any


def postpone_optimizer_step(engine: Any) -> None:
    """Remove the optimizer step from the schedule of a pipeline engine. `run_optimizer_step` runs it later."""
    instructions = type(engine)._INSTRUCTION_MAP
    optimizer_step = next(kind for kind in instructions if kind.__name__ == "OptimizerStep")
    engine._INSTRUCTION_MAP = {**instructions, optimizer_step: lambda *_, **__: None}


def run_optimizer_step(engine: Any) -> None:
    """Run the optimizer step of a pipeline engine: clip, step and clear the gradients."""
    engine._exec_optimizer_step()


def release_small_weights(zero_optimizer: Any) -> None:
    """Partition the small weights of ZeRO 3 again. Forward passes and the optimizer step leave them gathered.

    DeepSpeed keeps weights below stage3_param_persistence_threshold elements gathered on all ranks.
    """
    zero_optimizer._post_step(set())


def copy_fp32_weights(zero_optimizer: Any, num_groups: int) -> None:
    """Update the weights of ZeRO 3 from the fp32 weights, group by group."""
    zero_optimizer._partition_all_parameters()
    for group_index in range(num_groups):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(group_index)
    release_small_weights(zero_optimizer)
