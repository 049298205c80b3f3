"""Check rules of matrix products in float8."""

from collections.abc import Iterator
from typing import NamedTuple

from dist_llm.config.derive import resolve_d_ff
from dist_llm.config.feedforward_sections import MoEConfig, RegisteredConfig
from dist_llm.config.load import Violation
from dist_llm.config.schema import UnresolvedConfig

FP8_MULTIPLE = 16  # the float8 kernels require that all dimensions of a matrix product are multiples of 16


class MatrixDimension(NamedTuple):
    """A dimension of the matrices of a block, and the keys that set it."""

    keys: tuple[str, ...]
    size: int
    num_shards: int


def check_fp8(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations for settings that are incompatible with `fp8` in every layout."""
    if config.fp8 and config.precision != "bf16":
        yield Violation(
            ("fp8", "precision"),
            f"true with precision {config.precision}: all other products run in bf16; set precision to "
            "bf16, or fp8 to false",
        )
    if config.fp8 and config.engine != "native":
        yield Violation(("fp8", "engine"), f"true under engine: {config.engine}; set it to false, or engine to native")


def check_fp8_sizes(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations for weight matrices of a block whose shards the float8 kernels do not support."""
    model, tp = config.model, config.parallel.tp
    if not config.fp8 or isinstance(model.feedforward, MoEConfig):  # check_moe refuses experts in float8
        return
    if isinstance(model.feedforward, RegisteredConfig):
        yield Violation(
            ("fp8", "model.feedforward.name"), "true with a feed-forward layer of another package; set fp8 to false"
        )
        return
    head_dim = model.head_dim or model.d_model // model.n_heads
    num_kv_heads = model.n_kv_heads or model.n_heads
    dimensions = [
        MatrixDimension(("model.d_model",), model.d_model, num_shards=1),
        MatrixDimension(("model.n_heads", "model.head_dim"), model.n_heads * head_dim, num_shards=tp),
        MatrixDimension(("model.n_kv_heads", "model.head_dim"), num_kv_heads * head_dim, num_shards=tp),
        MatrixDimension(("model.d_ff",), resolve_d_ff(model), num_shards=tp),
    ]
    if model.output_gate == "per_head":
        dimensions.append(MatrixDimension(("model.n_heads", "model.output_gate"), model.n_heads, num_shards=tp))
    for keys, size, num_shards in dimensions:
        if size % num_shards == 0 and size // num_shards % FP8_MULTIPLE:
            shard_text = f", {size // num_shards} on a rank of tp {num_shards}," if num_shards > 1 else ""
            yield Violation(
                (*keys, *(("parallel.tp",) if num_shards > 1 else ()), "fp8"),
                f"a matrix dimension of {size}{shard_text} is not supported in float8, which needs multiples of "
                f"{FP8_MULTIPLE}; change it, or set fp8 to false",
            )
