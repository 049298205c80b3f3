"""Merge the parts of `prepare --part` into one corpus: a manifest that points at their files."""

import os
import re
import sys
from pathlib import Path
from typing import TextIO

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import SPLITS, Manifest, Shard, Split
from dist_llm.data.tokenizer_file import same_tokenizer
from dist_llm.errors import DataError
from dist_llm.text.corpus_part import CorpusPart
from dist_llm.text.publish import lock_output
from dist_llm.text.report import Report
from dist_llm.text.tokenizer import Tokenizer

# Options about the origin of the tokenizer may differ: the tokenizers themselves are compared.
MAY_DIFFER = {"part", "tokenizer", "split_pattern", "bpe_train_bytes"}


def merge_parts(out: Path, stream: TextIO | None = None) -> Manifest:
    """Write OUT/manifest.json over the shards of OUT/part-1-of-n to part-n-of-n, in this order.

    Raises DataError if a part is missing, incomplete, damaged, or made with other options or another tokenizer.
    """
    out = Path(os.path.realpath(out))
    corpus_parts = _find_parts(out)
    try:
        with lock_output(out):
            manifests = [Manifest.load(out / part.name) for part in corpus_parts]
            report = _merge_reports(out, corpus_parts)
            _check_same_tokenizer(out, corpus_parts, manifests)
            first = manifests[0]
            merged = Manifest(
                dtype=first.dtype,
                vocab_size=first.vocab_size,
                tokenizer_sha256=first.tokenizer_sha256,
                source=first.source,
                shards={split: _merge_shards(corpus_parts, manifests, split) for split in SPLITS},
                bad_rows=report.bad_rows,
                prompts=first.prompts,
            )
            if not merged.tokens("train"):
                raise DataError(f"{out}: no text to train on in any part. Give more text.")
            Tokenizer.load(out / corpus_parts[0].name).save(out)
            report.save(out)
            merged.save(out)
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written: {error.strerror or error}.") from None
    documents, tokens = (sum(map(count, SPLITS)) for count in (merged.documents, merged.tokens))
    lines = [f"merged {out}: {len(corpus_parts)} parts, {documents:,} documents, {tokens:,} tokens", *report.lines()]
    print("\n".join(lines), file=stream or sys.stderr)
    return merged


def _find_parts(out: Path) -> list[CorpusPart]:
    """Return all n parts in order. Raises DataError with the name of a missing one."""
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    num_parts = {match[0]: int(match[1]) for name in names if (match := re.fullmatch(r"part-\d+-of-(\d+)", name))}
    if not num_parts:
        raise DataError(f"--merge {out}: has no parts. Make them with: dist-llm prepare ... --part 1/2 --out {out}")
    if len(set(num_parts.values())) > 1:
        raise DataError(
            f"--merge {out}: has parts of different divisions: {', '.join(sorted(num_parts))}. Keep one division."
        )
    n = next(iter(num_parts.values()))
    for part in (corpus_parts := [CorpusPart(number, n) for number in range(1, n + 1)]):
        if part.name not in num_parts:
            raise DataError(
                f"--merge {out}: {part.name} is missing. Make it with the command of the other parts "
                f"and --part {part.number}/{n}."
            )
    return corpus_parts


def _merge_reports(out: Path, corpus_parts: list[CorpusPart]) -> Report:
    """Sum the reports. Raises DataError if options differ between parts, because documents could then occur twice."""
    reports = [Report.load(out / part.name) for part in corpus_parts]
    first = reports[0].options
    total = Report({**first, "part": None})
    for part, report in zip(corpus_parts, reports, strict=True):
        for name, value in report.options.items():
            if name not in MAY_DIFFER and value != first.get(name):
                raise DataError(
                    f"--merge {out}: {part.name} was made with {name} {value!r}, but {corpus_parts[0].name} with "
                    f"{first.get(name)!r}. Make one of them again with the options of the other."
                )
        total.add(report)
    return total


def _check_same_tokenizer(out: Path, corpus_parts: list[CorpusPart], manifests: list[Manifest]) -> None:
    for part, manifest in zip(corpus_parts, manifests, strict=True):
        if manifest.tokenizer_sha256 != manifests[0].tokenizer_sha256 and not same_tokenizer(
            out / part.name, out / corpus_parts[0].name
        ):
            raise DataError(
                f"--merge {out}: the tokenizer of {part.name} differs from that of {corpus_parts[0].name}. Check that "
                f"the machines read the same files. Make it again with --tokenizer {out / corpus_parts[0].name}."
            )
        for split in SPLITS:
            Corpus(out / part.name, split).check_shard_sizes()


def _merge_shards(corpus_parts: list[CorpusPart], manifests: list[Manifest], split: Split) -> tuple[Shard, ...]:
    return tuple(
        Shard(f"{part.name}/{shard.file}", shard.tokens, shard.documents, shard.text_bytes, shard.sha256)
        for part, manifest in zip(corpus_parts, manifests, strict=True)
        for shard in manifest.shards[split]
    )
