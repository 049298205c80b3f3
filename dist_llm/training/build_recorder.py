"""Build the recorder of metrics with its sinks: metrics.jsonl, TensorBoard and the console."""

import logging
from contextlib import ExitStack
from pathlib import Path

from dist_llm.config.sequence_lengths import compute_inputs_len, count_sample_tokens
from dist_llm.observe.console import ConsoleSink
from dist_llm.observe.flops import CONVENTION, count_flops_per_sample, find_peak_flops
from dist_llm.observe.metrics import MetricsFile, MetricsRecorder
from dist_llm.observe.tensorboard import TensorBoard
from dist_llm.training.callback import TrainingState

log = logging.getLogger("dist_llm")


def build_recorder(state: TrainingState, open_sinks: ExitStack) -> MetricsRecorder:
    """Return the recorder of this rank. Only rank 0 has sinks, which `open_sinks` closes."""
    config, step, run_dir = state.config, state.progress.step, Path(state.config.run.dir)
    device = state.engine.device
    peak, peak_origin = find_peak_flops(device, config.precision)
    if config.log.peak_tflops:
        peak, peak_origin = config.log.peak_tflops * 1e12, "log.peak_tflops"
    sample_flops = count_flops_per_sample(config.model, compute_inputs_len(config), state.loader.objective.encoder_len)
    log.info("MFU: %s; %.3f TFLOP/s per device, %s", CONVENTION, peak / 1e12, peak_origin)
    sinks: list[MetricsFile | TensorBoard | ConsoleSink] = []
    if state.world.is_main:
        sinks.append(MetricsFile(run_dir / "metrics.jsonl", step))
        if config.log.tensorboard:
            sinks.append(TensorBoard(run_dir / "tensorboard", step))
        sinks.append(ConsoleSink(config.run.steps, step))
    for sink in sinks:
        open_sinks.callback(sink.close)
    source_names = [source.name for source in state.loader.plan.sources if source.name]
    source_tokens = {name: state.progress.source_tokens.get(name, 0) for name in source_names}
    return MetricsRecorder(
        sinks,
        flops_per_token=sample_flops / count_sample_tokens(config),
        peak_flops=peak * state.world.world_size,
        device=device,
        source_tokens=source_tokens if len(source_tokens) > 1 else None,
    )
