"""The rows of a Hugging Face tensor that hold one of our tensors, where Hugging Face fuses or reorders tensors."""

from collections.abc import Callable, Sequence

from dist_llm.config.derive import count_rotated_dims
from dist_llm.config.model_section import ModelConfig


def _count_qkv_rows(model: ModelConfig) -> dict[str, int]:
    """Return the number of rows of the projections of queries, keys and values."""
    num_key_rows = model.n_kv_heads * model.head_dim
    return {"q": model.n_heads * model.head_dim, "k": num_key_rows, "v": num_key_rows}


def select_stacked_qkv(name: str) -> Callable[[ModelConfig], Sequence[int]]:
    """Return a function that selects the rows of `name` ("q", "k" or "v") in a fused tensor.

    The tensor has all queries, then all keys, then all values (Phi-3).
    """

    def rows(model: ModelConfig) -> Sequence[int]:
        sizes = _count_qkv_rows(model)
        names = list(sizes)
        start = sum(sizes[before] for before in names[: names.index(name)])
        return range(start, start + sizes[name])

    return rows


def select_stacked_gate_up(index: int) -> Callable[[ModelConfig], Sequence[int]]:
    """Return a function that selects the gate (index 0) or the up projection (index 1), one after the other."""
    return lambda model: range(index * model.d_ff, (index + 1) * model.d_ff)


def select_qkv_by_kv_head(name: str) -> Callable[[ModelConfig], Sequence[int]]:
    """Return a function that selects the rows of `name` ("q", "k" or "v") in a tensor that is fused by key-value head.

    For each key-value head, the tensor has its query heads, its key and its value (Falcon; GPT-NeoX has one query head
    for each key-value head).
    """

    def rows(model: ModelConfig) -> Sequence[int]:
        heads_per_group = model.n_heads // model.n_kv_heads
        heads = {"q": range(heads_per_group), "k": [heads_per_group], "v": [heads_per_group + 1]}[name]
        return [
            (group * (heads_per_group + 2) + head) * model.head_dim + element
            for group in range(model.n_kv_heads)
            for head in heads
            for element in range(model.head_dim)
        ]

    return rows


def select_interleaved_rotary(name: str) -> Callable[[ModelConfig], Sequence[int]]:
    """Return a function that selects the rows of `name` ("q" or "k") where rotated dimensions are interleaved.

    Hugging Face rotates the pairs (2i, 2i + 1) of a head; we rotate (i, i + F), F frequencies apart (Cohere, GLM).
    """

    def rows(model: ModelConfig) -> Sequence[int]:
        num_rotated = count_rotated_dims(model)
        order = [*range(0, num_rotated, 2), *range(1, num_rotated, 2), *range(num_rotated, model.head_dim)]
        num_heads = _count_qkv_rows(model)[name] // model.head_dim
        return [head * model.head_dim + element for head in range(num_heads) for element in order]

    return rows
