"""The private interfaces of DeepSpeed that its engine uses. No other module may use a private interface.

They match DeepSpeed 0.19; `tests/test_compat.py` checks each in the installed version. Nothing here imports DeepSpeed:
the functions take its objects.
"""

from typing import Any


def postpone_optimizer_step(engine: Any) -> None:
    """Remove the update from the schedule of a pipeline engine. `run_optimizer_step` does it."""
    schedule = type(engine)._INSTRUCTION_MAP
    step = next(kind for kind in schedule if kind.__name__ == "OptimizerStep")
    engine._INSTRUCTION_MAP = {**schedule, step: lambda *_, **__: None}


def run_optimizer_step(engine: Any) -> None:
    """Run the update of a pipeline engine: clip, step and clear the gradients."""
    engine._exec_optimizer_step()


def release_small_weights(zero: Any) -> None:
    """Partition the small weights of stage 3 again, which forward and step leave gathered."""
    zero._post_step(set())


def copy_fp32_weights(zero: Any, num_groups: int) -> None:
    """Update the weights of stage 3 from the fp32 weights, group by group."""
    zero._partition_all_parameters()
    for number in range(num_groups):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    release_small_weights(zero)
