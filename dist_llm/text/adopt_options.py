"""The options of `dist-llm adopt`, as a dataclass and as command-line arguments.

Imports the standard library only, so that `--help` is instant.
"""

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

FORMATS = ("megatron", "npy", "bin", "llmc")
EOT_POSITIONS = ("start", "end")
DTYPES = ("uint16", "int16", "uint32", "int32")

EPILOG = """\
Nothing is copied: the new directory contains a manifest that points at the files, the tokenizer, and the offsets of
documents. If you move or change a file, adopt again.

examples:
  # Megatron-LM: mix_text_document.bin and its .idx
  dist-llm adopt --format megatron --data mix_text_document --tokenizer vocab.json,merges.txt --out data/mix

  # nanoGPT
  dist-llm adopt --format bin --dtype uint16 --data train.bin --heldout val.bin --tokenizer gpt2 --out data/owt

  # nanoGPT with an id for each character
  dist-llm adopt --format bin --dtype uint16 --data train.bin --tokenizer meta.pkl --out data/chars

  # llm.c's FineWeb, a hundred files
  dist-llm adopt --format llmc --data fineweb_train_*.bin --heldout fineweb_val_*.bin --tokenizer gpt2 --out data/fw

  # remote files: read once now, and fetched again when training needs them
  dist-llm adopt --format npy --data s3://bucket/part-000.npy --tokenizer data/owt --out data/far
"""


@dataclass(frozen=True)
class AdoptOptions:
    """The token files, their format and tokenizer, and the corpus to build from them."""

    format: str
    data: tuple[str, ...]
    tokenizer: str
    out: Path
    heldout: tuple[str, ...] = ()
    dtype: str | None = None
    eot_position: str | None = None
    split_pattern: str | None = None
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every field of AdoptOptions to `parser`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "--format",
        choices=FORMATS,
        required=True,
        help="megatron: .bin with its .idx beside it; npy: flat arrays; bin: only ids (nanoGPT, OLMo); llmc: llm.c's",
    )
    add(
        "--data",
        action="extend",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files or URLs of training tokens, in their order",
    )
    add(
        "--heldout",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files or URLs of held-out tokens (default: none, so there is no evaluation)",
    )
    add(
        "--tokenizer",
        required=True,
        help="the tokenizer of the ids: as for prepare, except bpe:N, because there is no text to train on",
    )
    add("--split-pattern", help="as for prepare")
    add("--dtype", choices=DTYPES, help="type of the ids, little-endian; only for --format bin, other formats store it")
    add(
        "--eot-position",
        choices=EOT_POSITIONS,
        help="the position of <|endoftext|> in a document (default: start for llmc, end for npy and bin; an index of "
        "megatron contains it)",
    )
    add("--out", type=Path, required=True, help="the directory of the corpus; it is created when complete")
    add("--workers", type=int, default=os.cpu_count() or 1, help="files read at once (default: one per CPU)")


def build_options(namespace: argparse.Namespace) -> AdoptOptions:
    """Build the options from a namespace parsed with `add_arguments`; other attributes are ignored."""
    values = {each.name: getattr(namespace, each.name) for each in fields(AdoptOptions)}
    return AdoptOptions(**{**values, "data": tuple(values["data"]), "heldout": tuple(values["heldout"])})
