"""Build the engine of a config."""

import torch

from dist_llm.config.schema import Config
from dist_llm.engines.accelerate_engine import AccelerateDeepSpeedEngine, AccelerateEngine
from dist_llm.engines.base import Engine
from dist_llm.engines.deepspeed_engine import DeepSpeedEngine
from dist_llm.engines.deepspeed_pipeline import DeepSpeedPipelineEngine
from dist_llm.engines.native import NativeEngine


def build_engine(config: Config, device: torch.device) -> Engine:
    """Build the engine of a resolved config. A process group must exist, except for the native engine on one rank."""
    if config.engine == "native":
        return NativeEngine(config, device)
    if config.engine == "deepspeed":
        return (DeepSpeedPipelineEngine if config.parallel.pp > 1 else DeepSpeedEngine)(config, device)
    return (AccelerateDeepSpeedEngine if config.uses_deepspeed else AccelerateEngine)(config, device)
