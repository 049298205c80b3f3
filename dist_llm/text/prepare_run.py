"""One run of prepare: write a corpus directory from the input files, or resume an interrupted run."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_llm.data.shard import SPLITS, Manifest, smallest_dtype
from dist_llm.errors import DataError
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.chunks import ChunkReader
from dist_llm.text.corpus_part import CorpusPart
from dist_llm.text.corpus_writer import KEYS_FILE, CorpusWriter
from dist_llm.text.encode import EncoderSpec, encode_in_order, is_heldout
from dist_llm.text.filters import Filters
from dist_llm.text.input_files import InputFile
from dist_llm.text.journal import JOURNAL_FILE, Journal
from dist_llm.text.options import PrepareOptions
from dist_llm.text.progress import ProgressMeter
from dist_llm.text.report import InputTable, RemovalCounts, Report
from dist_llm.text.rows import MAX_LOCATIONS, Tally
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer

PROGRESS_FORMAT = "dist_llm prepare progress 1"
NON_CORPUS_OPTIONS = {
    "out",
    "workers",
    "max_bad_rate",
    "overwrite",
    "skip_unreadable",
}  # options that do not change the corpus


def select_corpus_options(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that decide the content of the corpus, as JSON stores them (a tuple becomes a list)."""
    selected = {name: value for name, value in asdict(options).items() if name not in NON_CORPUS_OPTIONS}
    loaded: dict[str, Any] = json.loads(json.dumps(selected))
    return loaded


class PrepareRun:
    """One pass over the input files, which writes a corpus directory."""

    def __init__(
        self,
        options: PrepareOptions,
        part: CorpusPart,
        files: list[InputFile],
        directory: Path,
        meter: ProgressMeter,
        table: InputTable,
    ) -> None:
        self.table = table
        self.options, self.part, self.files = options, part, files
        self.directory, self.meter = directory, meter
        self.journal = Journal(directory)
        self.reader = ChunkReader(
            part.select_files(files), Tally(options.max_bad_rate, part, skip_unreadable=options.skip_unreadable)
        )
        self.corpus_options = select_corpus_options(options)
        self._trained_on: dict[int, list[str | int] | None] = {}
        self._resumed_bytes = 0

    def write_corpus(self) -> Manifest:
        """Write the tokenizer, the shards and the report, then the manifest."""
        journal_lines = self.journal.read()
        tokenizer = self._load_trained_tokenizer(journal_lines) or self._build_tokenizer()
        header = {
            "format": PROGRESS_FORMAT,
            "options": self.corpus_options,
            "tokenizer": tokenizer.sha256,
            "trained_on": list(self._trained_on.values()),
        }
        with self._resume(header, journal_lines, tokenizer) as writer:
            self._write_chunks(writer)
            shards = writer.close()
        self.reader.tally.check()
        self.report = self._build_report(writer)
        manifest = Manifest(
            dtype=smallest_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            source=self.options.source,
            shards=shards,
            bad_rows=self.report.bad_rows,
            prompts=self.options.prompt_key is not None,
        )
        if not manifest.tokens("train") and self.part.num_parts == 1:
            raise DataError(self._format_no_text_error(manifest))
        self.report.save(self.directory)
        for name in (JOURNAL_FILE, KEYS_FILE):
            (self.directory / name).unlink(missing_ok=True)
        manifest.save(self.directory)
        return manifest

    def _resume(
        self, header: dict[str, Any], journal_lines: list[dict[str, Any]], tokenizer: Tokenizer
    ) -> CorpusWriter:
        """Open the corpus of an earlier run at its last valid resume point, or an empty corpus."""
        records = self._select_valid_records(journal_lines, header)
        writer = self._build_writer(tokenizer)
        try:
            if records:
                writer.restore([record["note"] for record in records])
        except (
            DataError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # from LookupError on: a damaged record
            self.meter.print_line(f"starting over: {error}")
            writer.__exit__()
            writer, records = self._build_writer(tokenizer), []
        if records:
            done = sum(len(record["inputs"]) for record in records)
            self.meter.print_line(f"resuming after {done:,} of {len(self.reader.files):,} input files")
            self.reader.restore(done, records[-1]["counts"])
            self._resumed_bytes = writer.written_counts.bytes
        writer.remove_other_files({TOKENIZER_FILE, JOURNAL_FILE})
        tokenizer.save(self.directory)
        self.journal.rewrite([header, *records])
        return writer

    def _select_valid_records(
        self, journal_lines: list[dict[str, Any]], header: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """Return the records before the first input file that changed."""
        if journal_lines[:1] != [header]:
            return []
        usable: list[dict[str, Any]] = []
        remaining = iter(self.reader.files)
        for record in journal_lines[1:]:
            if not isinstance(record.get("inputs"), list) or not isinstance(record.get("counts"), dict):
                return usable  # a damaged line
            for fingerprint in record["inputs"]:
                file = next(remaining, None)
                if file is None or fingerprint is None or file.fingerprint != fingerprint:
                    return usable
            usable.append(record)
        return usable

    def _build_writer(self, tokenizer: Tokenizer) -> CorpusWriter:
        options = self.options
        removed = Filters(options.filter).zero_counts()
        if options.dedup:
            removed.add(f"dedup.{options.dedup}")
        dtype = smallest_dtype(tokenizer.vocab_size)
        return CorpusWriter(
            self.directory,
            dtype,
            options.shard_tokens,
            options.dedup,
            options.dedup_threshold,
            removed,
            prompts=options.prompt_key is not None,
        )

    def _write_chunks(self, writer: CorpusWriter) -> None:
        options = self.options
        spec = EncoderSpec(self.directory, options.heldout_fraction, options.filter, options.dedup, self.part)
        with closing(encode_in_order(self.reader.iter_chunks(), spec, options.workers)) as chunks:
            for chunk, resume_point in chunks:
                writer.add(chunk)
                new_bytes = writer.written_counts.bytes - self._resumed_bytes
                self.meter.update(self.reader.tally.bytes_read, new_bytes, writer.written_counts.documents)
                if resume_point:
                    self.journal.append(
                        {"inputs": resume_point.inputs, "counts": resume_point.counts, "note": writer.sync()}
                    )

    def _build_tokenizer(self) -> Tokenizer:
        if self.options.tokenizer.startswith("bpe:"):
            self.meter.print_line(f"training {self.options.tokenizer} ...")
        return build_tokenizer(self.options.tokenizer, self.options.split_pattern, self._iter_training_texts)

    def _load_trained_tokenizer(self, journal_lines: list[dict[str, Any]]) -> Tokenizer | None:
        """Load the bpe:N tokenizer of an earlier run if the options and its training files have not changed."""
        if (
            not self.options.tokenizer.startswith("bpe:")
            or not journal_lines
            or journal_lines[0].get("options") != self.corpus_options
        ):
            return None
        trained_on = journal_lines[0]["trained_on"]
        if None in trained_on or trained_on != [file.fingerprint for file in self.files[: len(trained_on)]]:
            return None
        try:
            tokenizer = Tokenizer.load(self.directory)
        except DataError:
            return None
        self._trained_on = dict(enumerate(trained_on))
        return tokenizer if tokenizer.sha256 == journal_lines[0]["tokenizer"] else None

    def _iter_training_texts(self) -> Iterator[str]:
        """Yield the first `bpe_train_bytes` of text that is not held out. All parts read the same text."""
        left, filters, removed = self.options.bpe_train_bytes, Filters(self.options.filter), RemovalCounts()
        tally = Tally(self.options.max_bad_rate, skip_unreadable=self.options.skip_unreadable)
        for number, file in enumerate(self.files):
            self._trained_on[number] = file.fingerprint
            for document in file.iter_documents(tally):
                filtered = filters(document.text, removed) if document.text else None
                text = (filtered or "").encode()
                if filtered is None or is_heldout(text, self.options.heldout_fraction):
                    continue
                yield filtered if len(text) <= left else text[:left].decode(errors="ignore")
                left -= len(text)
                if left <= 0:
                    return

    def _build_report(self, writer: CorpusWriter) -> Report:
        tally, counts = self.reader.tally, self.part.counts_textless_rows
        bad, empty = (tally.bad_rows, self.reader.empty_documents) if counts else (0, 0)
        for path, (size, _) in tally.unreadable.items():
            self.table.mark_unreadable(Path(path), size)
        read = writer.written_counts.documents + sum(each.documents for each in writer.removal_counts.values())
        return Report(
            self.corpus_options,
            read + bad + empty,
            bad,
            empty,
            writer.written_counts,
            writer.removal_counts,
            tally.bad_bytes if counts else 0,
            self.table,
            tally.unreadable,
            self.reader.list_warnings(self.part.num_parts == 1),
        )

    def _format_no_text_error(self, manifest: Manifest) -> str:
        removed = sum(each.documents for each in self.report.removed.values())
        return (
            f"--source {' '.join(self.options.source)}: no text to train on, in {self.report.rows:,} rows "
            f"({self.report.empty_documents:,} empty, {manifest.documents('heldout'):,} held out"
            f"{f', {removed:,} removed by rules' if removed else ''}). Give more text."
        )

    def print_summary(self, manifest: Manifest) -> None:
        """Print the counts, the report, the warnings and the first skipped rows and files."""
        tokens, texts, count = (
            sum(measure(split) for split in SPLITS)
            for measure in (manifest.tokens, manifest.text_bytes, manifest.documents)
        )
        out = self.options.out / self.part.name if self.part.num_parts > 1 else self.options.out
        self.meter.print_line(
            f"prepared {out}: {count:,} documents, {tokens:,} tokens of {manifest.vocab_size:,} ids, "
            f"{texts / max(tokens, 1):.2f} bytes per token, {sum(map(len, manifest.shards.values()))} shards, "
            f"{manifest.documents('heldout') / max(count, 1):.2%} held out, {manifest.bad_rows:,} bad rows, "
            f"{self.report.empty_documents:,} empty, {self.meter.seconds:.1f} s, "
            f"{(texts - self._resumed_bytes) / 1e6 / self.meter.seconds:.1f} MB/s"
        )
        warnings = (f"  warning: {each}" for each in self.report.warnings)
        for line in (*self.report.lines(), *warnings, *(f"  skipped {each}" for each in self._list_skipped())):
            self.meter.print_line(line)

    def _list_skipped(self) -> list[str]:
        """Return the first rows and files that were skipped."""
        tally = self.reader.tally
        files = [f"{path}: {reason}" for path, (_, reason) in tally.unreadable.items()]
        return [*tally.locations, *files[:MAX_LOCATIONS]]
