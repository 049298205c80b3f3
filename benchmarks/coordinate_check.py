"""Coordinate check: the size of activations after a few training steps, over widths or depths of the model.

    python benchmarks/coordinate_check.py
    python benchmarks/coordinate_check.py --depths 2 4 8 16

With a correct parametrization, sizes do not depend on the width (Yang et al. 2022, appendix D.1) or the depth (Dey et
al. 2025, figure 7). Prints a table per parametrization: the mean absolute value of activations, and the slope of its
logarithm, which is 0 if the size does not change and 1 if it doubles with each doubling.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.optim_sections import AdamWConfig
from dist_llm.config.parametrization_sections import CompletePConfig, MupConfig, Parametrization
from dist_llm.engines.optimizer_step import step_and_zero_grad
from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.models.init import init_param_
from dist_llm.optim.build_optimizer import build_optimizer

BASE_WIDTH, BASE_DEPTH = 32, 2
BATCH, SEQ_LEN, VOCAB_SIZE, HEAD_DIM = 8, 32, 128, 8
NUM_STEPS, LR = 5, 1e-2
PARAMETRIZATIONS: dict[str, Any] = {
    "standard": None,
    "mup": MupConfig(base_d_model=BASE_WIDTH),
    "completep": CompletePConfig(base_d_model=BASE_WIDTH, base_n_layers=BASE_DEPTH),
}
Activations = dict[str, float]  # {layer: mean absolute value of its output}


def measure_activations(parametrization: Parametrization | None, width: int, depth: int) -> Activations:
    """Train a decoder for NUM_STEPS steps on one random batch; return the sizes of its activations afterwards."""
    config = ModelConfig(
        d_model=width,
        n_layers=depth,
        n_heads=width // HEAD_DIM,
        n_kv_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        d_ff=2 * width,
        vocab_size=VOCAB_SIZE,
        max_seq_len=SEQ_LEN,
        parametrization=parametrization,
    )
    model, specs = build_model(config), build_param_specs(config)
    for name, parameter in model.named_parameters():
        init_param_(parameter.data, name, specs[name].init, 0, parameter.shape, (0,) * parameter.ndim)
    optimizer = build_optimizer(AdamWConfig(lr=LR, eps=1e-12), model.named_parameters(), specs)
    tokens = torch.randint(VOCAB_SIZE, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    for _ in range(NUM_STEPS):
        (model(tokens[:, :-1], tokens[:, 1:]).sum() / tokens[:, 1:].numel()).backward()
        step_and_zero_grad(optimizer, LR)
    return _record_activations(model, tokens[:, :-1])


def _record_activations(model: nn.Module, tokens: torch.Tensor) -> Activations:
    """Run the model and return the mean absolute outputs of the embedding, of the last block and of the head."""
    activations: Activations = {}
    last_block = f"blocks.{len(model.blocks) - 1}"  # type: ignore[arg-type]
    for name in ("embed", f"{last_block}.attention", f"{last_block}.feedforward", last_block, "head"):
        label = name.replace(last_block, "last block")

        def record(module: nn.Module, inputs: Any, output: Any, label: str = label) -> None:
            # A block also returns the statistics of its router.
            tensor = output[0] if isinstance(output, tuple) else output
            activations[label] = tensor.abs().mean().item()

        model.get_submodule(name).register_forward_hook(record)
    with torch.no_grad():
        model(tokens)
    return activations


def compute_slopes(sizes: Sequence[int], activations: Sequence[Activations]) -> dict[str, float]:
    """Return the least-squares slope of log(activation) over log(size of the model) of each layer."""
    x = torch.tensor([math.log2(size) for size in sizes], dtype=torch.float64)
    x = x - x.mean()
    return {
        name: float((x @ torch.tensor([math.log2(by_layer[name]) for by_layer in activations]).double()) / (x @ x))
        for name in activations[0]
    }


def print_table(title: str, sizes: Sequence[int], activations: Sequence[Activations]) -> None:
    """Print the activations of each size, and the slopes."""
    slopes: Mapping[str, float] = compute_slopes(sizes, activations)
    print(f"{title:26s}" + "".join(f"{size:>10d}" for size in sizes) + f"{'slope':>10s}")
    for name, slope in slopes.items():
        print(f"  {name:24s}" + "".join(f"{by_layer[name]:10.4f}" for by_layer in activations) + f"{slope:+10.2f}")


def main() -> None:
    """Print one table per parametrization."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], help="values of d_model")
    parser.add_argument("--depths", type=int, nargs="+", help="values of n_layers, instead of --widths")
    arguments = parser.parse_args()
    sizes = arguments.depths or arguments.widths
    for name, parametrization in PARAMETRIZATIONS.items():
        shapes = [(BASE_WIDTH, size) if arguments.depths else (size, BASE_DEPTH) for size in sizes]
        activations = [measure_activations(parametrization, width, depth) for width, depth in shapes]
        print_table(f"{name}, {'depth' if arguments.depths else 'width'}", sizes, activations)


if __name__ == "__main__":
    main()
