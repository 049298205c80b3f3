"""Train with DeepSpeed on several ranks: load, take steps, save, and return the state of DeepSpeed.

_, state = run_deepspeed(Run(stage=2, steps=range(3), save=tmp_path))  # on each rank of a world
*_, expected = run_plain_torch("odd", num_steps=3)  # the same steps in one process with plain torch
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.optim_sections import AdamWConfig
from dist_llm.models.attention_mask import EncoderInput
from dist_llm.models.build_model import build_model
from dist_llm.optim.build_optimizer import build_optimizer
from dist_llm.param_spec import collect_param_specs

# All sizes but the number of layers are odd, so that each kind of partition has padding.
SIZES: dict[str, Any] = {
    "d_model": 7,
    "n_layers": 2,
    "n_heads": 1,
    "n_kv_heads": 1,
    "head_dim": 7,
    "d_ff": 5,
    "vocab_size": 13,
    "vocab_multiple": 1,
    "max_seq_len": 9,
    "positions": "learned",
}
MODELS: dict[str, dict[str, Any]] = {
    "odd": {},
    "even": {"d_model": 8, "head_dim": 8, "d_ff": 16, "vocab_size": 16},
    "shared": {"architecture": "encoder_decoder", "n_encoder_layers": 1, "positions": "none", "tie_embeddings": True},
}
# Model -> name of the parameter that is not trained, to test checkpoints with frozen parameters.
FROZEN = {"shared": "blocks.0.norm_attention.weight"}
OPTIM = AdamWConfig(lr=1e-2, implementation="foreach")
NUM_ROWS, SEQ_LEN = 4, 8
NamedTensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A DeepSpeed run. `load` and `save` are checkpoint directories; `steps` are the indices of the batches.

    `zero` has keys of section zero_optimization of DeepSpeed's config, `config` has further keys of the config.
    """

    stage: int  # of ZeRO
    model: str = "odd"  # a key of MODELS
    steps: range = range(3)
    load: Path | None = None
    save: Path | None = None
    moments: bool = True  # also load the optimizer state
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class TrainedModel(NamedTuple):
    """A model and its optimizer."""

    model: nn.Module
    optimizer: optim.Optimizer
    param_groups: list[list[str]]  # parameter names of each parameter group of the optimizer


class DeepSpeedStates(NamedTuple):
    """The state of DeepSpeed at two times of a run, with the names of our checkpoints."""

    loaded: NamedTensors  # after loading; empty if the run loads nothing
    final: NamedTensors


def build_trained_model(name: str) -> TrainedModel:
    """Build the model `name` of MODELS, with fixed weights, and its optimizer."""
    model = build_model(ModelConfig(**{**SIZES, **MODELS[name]}))
    for seed, parameter in enumerate(model.parameters()):
        nn.init.uniform_(parameter, -0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    trained = [
        (param_name, parameter) for param_name, parameter in model.named_parameters() if param_name != FROZEN.get(name)
    ]
    optimizer = build_optimizer(OPTIM, trained, collect_param_specs(model))
    for param_name, parameter in model.named_parameters():
        parameter.requires_grad_(param_name != FROZEN.get(name))
    names = {parameter: param_name for param_name, parameter in trained}
    param_groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    return TrainedModel(model, optimizer, param_groups)


def compute_loss(model: Any, name: str, step: int, *, rank: int, world_size: int) -> Tensor:
    """Return the mean loss over the rows of one rank in the batch of a step; `name` is a key of MODELS."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(SIZES["vocab_size"], (NUM_ROWS, SEQ_LEN + 1), generator=generator)[rank::world_size]
    kwargs = {"encoder_input": EncoderInput(ids.flip(1))} if name == "shared" else {}
    return model(ids[:, :-1], targets_BS=ids[:, 1:], **kwargs).sum() / ids[:, 1:].numel()


def run_plain_torch(name: str, num_steps: int) -> Iterator[NamedTensors]:
    """Yield weights and moments after each step, with the names of our checkpoints."""
    model, optimizer, _ = build_trained_model(name)
    for step in range(num_steps):
        compute_loss(model, name, step, rank=0, world_size=1).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        parameters = dict(model.named_parameters())
        tensors = {f"model.{param_name}": parameter.detach().clone() for param_name, parameter in parameters.items()}
        for param_name, parameter in parameters.items():
            tensors |= {
                f"optim.{param_name}.{key}": value.clone() for key, value in optimizer.state.get(parameter, {}).items()
            }
        yield tensors


def run_deepspeed(run: Run) -> DeepSpeedStates:
    """Load, train and save with DeepSpeed, as `run` says. Every rank must call this, and gets the full tensors."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler
    model, optimizer, _ = build_trained_model(run.model)
    config = {
        "train_micro_batch_size_per_gpu": NUM_ROWS // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": run.stage, **run.zero},
        "zero_allow_untested_optimizer": True,
        **run.config,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    loaded: NamedTensors = {}
    if run.load is not None:
        path, _ = engine.load_checkpoint(str(run.load), load_optimizer_states=run.moments)
        assert path is not None, f"DeepSpeed finds no checkpoint in {run.load}"
        loaded = gather_state(engine, model, run)
        for state in get_torch_optimizer(engine).state.values():
            # At stage 3, a universal checkpoint gives all groups the same step tensor, which each group would
            # increment.
            state.update({key: value.clone() for key, value in state.items() if key == "step"})
    for step in run.steps:
        loss = compute_loss(engine, run.model, step, rank=dist.get_rank(), world_size=dist.get_world_size())
        engine.backward(loss)
        engine.step()
    if run.save is not None:
        engine.save_checkpoint(str(run.save))
    final = gather_state(engine, model, run)
    engine.destroy()
    return DeepSpeedStates(loaded, final)


def gather_state(engine: Any, model: nn.Module, run: Run) -> NamedTensors:
    """Return the state of DeepSpeed with the names of our checkpoints: fp32 weights, moments, steps.

    With `round_robin_gradients`, return only weights: DeepSpeed then looks up optimizer tensors at wrong offsets.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors: NamedTensors = {}
    steps = {float(state["step"]) for state in get_torch_optimizer(engine).state.values() if "step" in state}
    assert len(steps) <= 1
    if run.stage in (1, 2):
        # DeepSpeed links the states after the first step of the first group, before the second group has moments.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in model.named_parameters():
        if run.zero.get("round_robin_gradients"):
            tensors[f"model.{name}"] = parameter.detach().clone()
        elif run.stage == 0:
            tensors[f"model.{name}"] = parameter.detach().clone()
            state = engine.optimizer.state.get(parameter, {})
            tensors |= {f"optim.{name}.{key}": value.clone() for key, value in state.items()}
        elif not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                tensors[f"model.{name}"] = parameter.detach().float().clone()
        else:
            tensors[f"model.{name}"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq") if steps else ():
                tensors[f"optim.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
            tensors |= {f"optim.{name}.step": torch.tensor(step) for step in steps}
    return tensors


def get_torch_optimizer(engine: Any) -> optim.Optimizer:
    """Return the torch optimizer inside the DeepSpeed optimizer."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)
