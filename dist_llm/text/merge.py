"""The command `prepare --merge`: make one corpus of the parts that several `prepare --part i/n` commands wrote.

The shards stay in the directories of the parts. The merged corpus has a manifest that lists the shards of all parts.
"""

import os
import re
import sys
from pathlib import Path
from typing import TextIO

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import SPLITS, CorpusManifest, Shard, Split
from dist_llm.data.tokenizer_file import is_same_tokenizer
from dist_llm.errors import DataError
from dist_llm.text.corpus_part import CorpusPart
from dist_llm.text.publish import lock_output
from dist_llm.text.report import PrepareReport
from dist_llm.text.tokenizer import Tokenizer

# Options of `prepare` that may differ between parts. The options of the tokenizer are among them, because
# `_check_same_tokenizer` compares the tokenizers of the parts instead.
OPTIONS_THAT_MAY_DIFFER = {"part", "tokenizer", "split_pattern", "bpe_train_bytes"}


def merge_parts(corpus_dir: Path, log_stream: TextIO | None = None) -> CorpusManifest:
    """Write `corpus_dir`/manifest.json. It lists the shards of `corpus_dir`/part-1-of-n to part-n-of-n, in this order.

    Print a summary to `log_stream` (default: stderr). Raises DataError if a part is missing, incomplete or damaged, or
    if its options or its tokenizer differ from those of the first part.
    """
    corpus_dir = Path(os.path.realpath(corpus_dir))
    corpus_parts = _find_parts(corpus_dir)
    try:
        with lock_output(corpus_dir):
            manifests = [CorpusManifest.load(corpus_dir / part.name) for part in corpus_parts]
            report = _merge_reports(corpus_dir, corpus_parts)
            _check_same_tokenizer(corpus_dir, corpus_parts, manifests)
            _check_shard_sizes(corpus_dir, corpus_parts)
            first_manifest = manifests[0]
            merged = CorpusManifest(
                dtype=first_manifest.dtype,
                vocab_size=first_manifest.vocab_size,
                tokenizer_sha256=first_manifest.tokenizer_sha256,
                source=first_manifest.source,
                shards={split: _merge_shards(corpus_parts, manifests, split) for split in SPLITS},
                bad_rows=report.bad_rows,
                prompts=first_manifest.prompts,
            )
            if not merged.count_tokens("train"):
                raise DataError(f"{corpus_dir}: no text to train on in any part. Give more text.")
            Tokenizer.load(corpus_dir / corpus_parts[0].name).save(corpus_dir)
            report.save(corpus_dir)
            merged.save(corpus_dir)
    except OSError as error:
        raise DataError(
            f"{error.filename or corpus_dir}: cannot be read or written: {error.strerror or error}."
        ) from None
    num_documents = sum(merged.count_documents(split) for split in SPLITS)
    num_tokens = sum(merged.count_tokens(split) for split in SPLITS)
    lines = [
        f"merged {corpus_dir}: {len(corpus_parts)} parts, {num_documents:,} documents, {num_tokens:,} tokens",
        *report.format_lines(),
    ]
    print("\n".join(lines), file=log_stream or sys.stderr)
    return merged


def _find_parts(corpus_dir: Path) -> list[CorpusPart]:
    """Return all parts in order. Raises DataError if a part is missing."""
    names = [path.name for path in corpus_dir.iterdir()] if corpus_dir.is_dir() else []
    num_parts_by_name = {
        match[0]: int(match[1]) for name in names if (match := re.fullmatch(r"part-\d+-of-(\d+)", name))
    }
    if not num_parts_by_name:
        raise DataError(
            f"--merge {corpus_dir}: has no parts. Make them with: dist-llm prepare ... --part 1/2 --out {corpus_dir}"
        )
    if len(set(num_parts_by_name.values())) > 1:
        raise DataError(
            f"--merge {corpus_dir}: the parts belong to corpora with different numbers of parts: "
            f"{', '.join(sorted(num_parts_by_name))}. Keep the parts of one corpus and remove the others."
        )
    num_parts = next(iter(num_parts_by_name.values()))
    corpus_parts = [CorpusPart(number, num_parts) for number in range(1, num_parts + 1)]
    for part in corpus_parts:
        if part.name not in num_parts_by_name:
            raise DataError(
                f"--merge {corpus_dir}: {part.name} is missing. Make it with the command of the other parts "
                f"and --part {part.number}/{num_parts}."
            )
    return corpus_parts


def _merge_reports(corpus_dir: Path, corpus_parts: list[CorpusPart]) -> PrepareReport:
    """Add up the reports of all parts.

    Raises DataError if the options of two parts differ, because the same document could then be in both parts.
    """
    reports = [PrepareReport.load(corpus_dir / part.name) for part in corpus_parts]
    first_options = reports[0].options
    merged_report = PrepareReport({**first_options, "part": None})
    for part, report in zip(corpus_parts, reports, strict=True):
        for name, value in report.options.items():
            if name not in OPTIONS_THAT_MAY_DIFFER and value != first_options.get(name):
                raise DataError(
                    f"--merge {corpus_dir}: {part.name} was made with {name} {value!r}, but {corpus_parts[0].name} "
                    f"with {first_options.get(name)!r}. Make one of them again with the options of the other."
                )
        merged_report.add(report)
    return merged_report


def _check_same_tokenizer(corpus_dir: Path, corpus_parts: list[CorpusPart], manifests: list[CorpusManifest]) -> None:
    """Raise DataError if the tokenizer of a part differs from that of the first part."""
    for part, manifest in zip(corpus_parts, manifests, strict=True):
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256 and not is_same_tokenizer(
            corpus_dir / part.name, corpus_dir / corpus_parts[0].name
        ):
            raise DataError(
                f"--merge {corpus_dir}: {part.name} has a different tokenizer from {corpus_parts[0].name}; perhaps the "
                f"machines read different files. Make {part.name} again with --tokenizer "
                f"{corpus_dir / corpus_parts[0].name}."
            )


def _check_shard_sizes(corpus_dir: Path, corpus_parts: list[CorpusPart]) -> None:
    """Raise DataError if a shard of a part is missing or truncated."""
    for part in corpus_parts:
        for split in SPLITS:
            Corpus(corpus_dir / part.name, split).check_shard_sizes()


def _merge_shards(corpus_parts: list[CorpusPart], manifests: list[CorpusManifest], split: Split) -> tuple[Shard, ...]:
    return tuple(
        Shard(f"{part.name}/{shard.file}", shard.tokens, shard.documents, shard.text_bytes, shard.sha256)
        for part, manifest in zip(corpus_parts, manifests, strict=True)
        for shard in manifest.shards[split]
    )
