"""Map one of our tensors to a part of a Hugging Face tensor, in both directions."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorMapping:
    """Maps one of our tensors, `native_name`, to a part of a Hugging Face tensor, `hf_name`.

    The part is chunk `chunk` of `num_chunks` equal chunks along the output dimension, without its first `skip` rows; or
    the given `rows`. A tensor of ours with the parameters of all experts has a mapping for each expert, if Hugging Face
    has a tensor for each: `hf_name` is then the matrix or bias of `expert`.
    """

    native_name: str
    hf_name: str
    transposed: bool = (
        False  # whether the Hugging Face tensor is [..., inputs, outputs] (Conv1D of GPT-2, experts of gpt-oss)
    )
    chunk: int = 0
    num_chunks: int = 1
    skip: int = 0  # rows of the Hugging Face tensor without a counterpart (the first two positions of BART)
    rows: tuple[int, ...] | None = None  # row of the Hugging Face tensor for each row of ours
    rows_dim: int = 0  # dimension of our tensor that `rows` indexes; 1 if the first dimension is experts
    expert: int | None = None  # index along the first dimension of our tensor
    plus_row: str = ""  # tensor whose first row is added to each row (segment embeddings of BERT)


def to_native(mapping: TensorMapping, hf_tensors: Mapping[str, Tensor]) -> Tensor:
    """Extract our tensor, or its part for one expert, from the Hugging Face tensors."""
    tensor = hf_tensors[mapping.hf_name]
    if mapping.transposed and tensor.ndim > 1:
        tensor = tensor.mT
    if mapping.rows is not None:
        return tensor.index_select(mapping.rows_dim, torch.tensor(mapping.rows, device=tensor.device))
    chunk_rows = len(tensor) // mapping.num_chunks
    tensor = tensor[mapping.chunk * chunk_rows : (mapping.chunk + 1) * chunk_rows][mapping.skip :]
    return tensor + hf_tensors[mapping.plus_row][0] if mapping.plus_row else tensor


def to_hf(group: Sequence[TensorMapping], read_native: Callable[[str], Tensor], saved: Mapping[str, Tensor]) -> Tensor:
    """Build a Hugging Face tensor from all mappings to it. This is the inverse of `to_native`.

    `saved` are Hugging Face tensors that an import saved, because our tensors lack a part of their values.
    """
    (mapping, *_) = group
    if mapping.expert is not None:
        return read_native(mapping.native_name)[mapping.expert]
    if mapping.rows is not None:
        tensor = _scatter_rows(group, read_native)
        return tensor.mT if mapping.transposed else tensor
    tensor = (
        torch.cat([read_native(mapping.native_name) for mapping in group])
        if len(group) > 1
        else read_native(group[0].native_name)
    )
    imported = saved.get(mapping.hf_name)
    if mapping.skip:
        rows = imported[: mapping.skip] if imported is not None else tensor.new_zeros(mapping.skip, *tensor.shape[1:])
        tensor = torch.cat((rows, tensor))
    if mapping.plus_row and imported is not None and torch.equal(tensor, imported + saved[mapping.plus_row][0]):
        tensor = imported  # unchanged since the import
    return tensor.mT if mapping.transposed and tensor.ndim > 1 else tensor


def _scatter_rows(group: Sequence[TensorMapping], read_native: Callable[[str], Tensor]) -> Tensor:
    """Write our tensors to their rows of a Hugging Face tensor, which they fill."""
    dim = group[0].rows_dim
    rows = torch.tensor([row for mapping in group for row in mapping.rows or ()])
    native = torch.cat([read_native(mapping.native_name) for mapping in group], dim)
    if len(rows) != native.shape[dim] or not torch.equal(rows.sort().values, torch.arange(len(rows))):
        raise AssertionError(f"the rows of {group[0].hf_name} are not a permutation")
    return torch.empty_like(native).index_copy_(dim, rows.to(native.device), native)


def group_by_hf_name(table: Sequence[TensorMapping]) -> Iterator[tuple[str, list[TensorMapping]]]:
    """Yield (Hugging Face tensor name, its mappings in order).

    The experts of one of our tensors follow each other, so that a reader can read our tensor once.
    """
    ordered = sorted(
        table,
        key=lambda mapping: (mapping.native_name if mapping.expert is not None else "", mapping.hf_name, mapping.chunk),
    )
    return ((hf_name, list(group)) for hf_name, group in groupby(ordered, key=lambda mapping: mapping.hf_name))


# Prefix of tensors that only the model of Hugging Face has. A checkpoint saves these tensors for a later export.
HF_ONLY_PREFIX = "theirs."


SEGMENT_EMBEDDINGS = "bert.embeddings.token_type_embeddings.weight"


# Buffers that only our model has. An import gives them their initial value, which is the same for all experts.
NATIVE_ONLY = re.compile(r"blocks\.\d+\.feedforward\.previous_load")
