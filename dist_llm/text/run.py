"""One run of prepare: sources to a filled directory, going on from where an earlier one was cut off."""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_llm.data.shard import SPLITS, Manifest, smallest_dtype
from dist_llm.errors import DataError
from dist_llm.text.assembly import KEYS, Assembly
from dist_llm.text.chunks import Reader
from dist_llm.text.encode import Recipe, encode_in_order, is_heldout
from dist_llm.text.filters import Filters
from dist_llm.text.journal import JOURNAL, Journal
from dist_llm.text.options import PrepareOptions
from dist_llm.text.progress import Meter
from dist_llm.text.report import InputTable, Removals, Report
from dist_llm.text.rows import LOCATIONS_KEPT, Tally
from dist_llm.text.share import Share
from dist_llm.text.sources import Source
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer
from dist_llm.text.vocabulary import build_tokenizer

PROGRESS_FORMAT = "dist_llm prepare progress 1"
DO_NOT_SHAPE = {
    "out",
    "workers",
    "max_bad_rate",
    "overwrite",
    "skip_unreadable",
}  # options that leave the corpus as it is


def shaping(options: PrepareOptions) -> dict[str, Any]:
    """The options that decide what is in the corpus, as they come back from a file."""
    found = {name: value for name, value in asdict(options).items() if name not in DO_NOT_SHAPE}
    read: dict[str, Any] = json.loads(json.dumps(found))
    return read


class Run:
    """One pass from sources to a filled directory."""

    def __init__(
        self,
        options: PrepareOptions,
        share: Share,
        sources: list[Source],
        directory: Path,
        meter: Meter,
        table: InputTable,
    ) -> None:
        self.table = table
        self.options, self.share, self.sources = options, share, sources
        self.directory, self.meter = directory, meter
        self.journal = Journal(directory)
        self.reader = Reader(
            share.files(sources), Tally(options.max_bad_rate, share, skip_unreadable=options.skip_unreadable)
        )
        self.shaping = shaping(options)
        self._trained_on: dict[int, list[str | int] | None] = {}
        self._bytes_before = 0

    def fill(self) -> Manifest:
        """Write tokenizer, shards, report and, last, the manifest."""
        past = self.journal.read()
        tokenizer = self._trained_before(past) or self._new_tokenizer()
        header = {
            "format": PROGRESS_FORMAT,
            "options": self.shaping,
            "tokenizer": tokenizer.sha256,
            "trained_on": list(self._trained_on.values()),
        }
        with self._take_up(header, past, tokenizer) as assembly:
            self._write(assembly)
            shards = assembly.close()
        self.reader.tally.check()
        self.report = self._report(assembly)
        manifest = Manifest(
            dtype=smallest_dtype(tokenizer.vocab_size),
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            source=self.options.source,
            shards=shards,
            bad_rows=self.report.bad_rows,
            prompts=self.options.prompt_key is not None,
        )
        if not manifest.tokens("train") and self.share.of == 1:
            raise DataError(self._nothing_left(manifest))
        self.report.save(self.directory)
        for name in (JOURNAL, KEYS):
            (self.directory / name).unlink(missing_ok=True)
        manifest.save(self.directory)
        return manifest

    def _take_up(self, header: dict[str, Any], past: list[dict[str, Any]], tokenizer: Tokenizer) -> Assembly:
        """The corpus as far as an earlier run got and its files still hold; else an empty one."""
        records = self._usable(past, header)
        assembly = self._assembly(tokenizer)
        try:
            if records:
                assembly.restore([record["note"] for record in records])
        except (DataError, LookupError, TypeError, ValueError, AttributeError) as error:  # the latter: it is damaged
            self.meter.say(f"starting over: {error}")
            assembly.__exit__()
            assembly, records = self._assembly(tokenizer), []
        if records:
            done = sum(len(record["inputs"]) for record in records)
            self.meter.say(f"going on after {done:,} of {len(self.reader.sources):,} input files, done before")
            self.reader.restore(done, records[-1]["counts"])
            self._bytes_before = assembly.kept.bytes
        assembly.clear_others({TOKENIZER_FILE, JOURNAL})
        tokenizer.save(self.directory)
        self.journal.begin([header, *records])
        return assembly

    def _usable(self, past: list[dict[str, Any]], header: dict[str, Any]) -> list[dict[str, Any]]:
        """Records of input files that have not changed, up to the first that has."""
        if past[:1] != [header]:
            return []
        usable: list[dict[str, Any]] = []
        left = iter(self.reader.sources)
        for record in past[1:]:
            if not isinstance(record.get("inputs"), list) or not isinstance(record.get("counts"), dict):
                return usable  # a damaged line
            for state in record["inputs"]:
                source = next(left, None)
                if source is None or state is None or source.state != state:
                    return usable
            usable.append(record)
        return usable

    def _assembly(self, tokenizer: Tokenizer) -> Assembly:
        options = self.options
        removed = Filters(options.filter).no_removals()
        if options.dedup:
            removed.add(f"dedup.{options.dedup}")
        dtype = smallest_dtype(tokenizer.vocab_size)
        return Assembly(
            self.directory,
            dtype,
            options.shard_tokens,
            options.dedup,
            options.dedup_threshold,
            removed,
            prompts=options.prompt_key is not None,
        )

    def _write(self, assembly: Assembly) -> None:
        options = self.options
        recipe = Recipe(self.directory, options.heldout_fraction, options.filter, options.dedup, self.share)
        with closing(encode_in_order(self.reader.chunks(), recipe, options.workers)) as chunks:
            for chunk, mark in chunks:
                assembly.add(chunk)
                new_bytes = assembly.kept.bytes - self._bytes_before
                self.meter.update(self.reader.tally.bytes_read, new_bytes, assembly.kept.documents)
                if mark:
                    self.journal.append({"inputs": mark.inputs, "counts": mark.counts, "note": assembly.note()})

    def _new_tokenizer(self) -> Tokenizer:
        if self.options.tokenizer.startswith("bpe:"):
            self.meter.say(f"training {self.options.tokenizer} ...")
        return build_tokenizer(self.options.tokenizer, self.options.split_pattern, self._training_texts)

    def _trained_before(self, past: list[dict[str, Any]]) -> Tokenizer | None:
        """The bpe:N of an earlier run, if its options and the files it was trained on are the same."""
        if not self.options.tokenizer.startswith("bpe:") or not past or past[0].get("options") != self.shaping:
            return None
        trained_on = past[0]["trained_on"]
        if None in trained_on or trained_on != [source.state for source in self.sources[: len(trained_on)]]:
            return None
        try:
            tokenizer = Tokenizer.load(self.directory)
        except DataError:
            return None
        self._trained_on = dict(enumerate(trained_on))
        return tokenizer if tokenizer.sha256 == past[0]["tokenizer"] else None

    def _training_texts(self) -> Iterator[str]:
        """The first `bpe_train_bytes` of text that is not held out: of the whole source, so that parts agree."""
        left, filters, removed = self.options.bpe_train_bytes, Filters(self.options.filter), Removals()
        tally = Tally(self.options.max_bad_rate, skip_unreadable=self.options.skip_unreadable)
        for number, source in enumerate(self.sources):
            self._trained_on[number] = source.state
            for document in source.documents(tally):
                kept = filters(document.text, removed) if document.text else None
                text = (kept or "").encode()
                if kept is None or is_heldout(text, self.options.heldout_fraction):
                    continue
                yield kept if len(text) <= left else text[:left].decode(errors="ignore")
                left -= len(text)
                if left <= 0:
                    return

    def _report(self, assembly: Assembly) -> Report:
        tally, counts = self.reader.tally, self.share.counts_textless
        bad, empty = (tally.bad_rows, self.reader.empty_documents) if counts else (0, 0)
        for path, (size, _) in tally.unreadable.items():
            self.table.move(Path(path), size)
        read = assembly.kept.documents + sum(each.documents for each in assembly.removed.values())
        return Report(
            self.shaping,
            read + bad + empty,
            bad,
            empty,
            assembly.kept,
            assembly.removed,
            tally.bad_bytes if counts else 0,
            self.table,
            tally.unreadable,
            self.reader.warnings(self.share.of == 1),
        )

    def _nothing_left(self, manifest: Manifest) -> str:
        removed = sum(each.documents for each in self.report.removed.values())
        return (
            f"--source {' '.join(self.options.source)}: no text to train on, in {self.report.rows:,} rows "
            f"({self.report.empty_documents:,} empty, {manifest.documents('heldout'):,} held out"
            f"{f', {removed:,} removed by rules' if removed else ''}). Give more text."
        )

    def summarise(self, manifest: Manifest) -> None:
        """Say what came of it."""
        tokens, texts, count = (
            sum(measure(split) for split in SPLITS)
            for measure in (manifest.tokens, manifest.text_bytes, manifest.documents)
        )
        out = self.options.out / self.share.name if self.share.of > 1 else self.options.out
        self.meter.say(
            f"prepared {out}: {count:,} documents, {tokens:,} tokens of {manifest.vocab_size:,} ids, "
            f"{texts / max(tokens, 1):.2f} bytes per token, {sum(map(len, manifest.shards.values()))} shards, "
            f"{manifest.documents('heldout') / max(count, 1):.2%} held out, {manifest.bad_rows:,} bad rows, "
            f"{self.report.empty_documents:,} empty, {self.meter.seconds:.1f} s, "
            f"{(texts - self._bytes_before) / 1e6 / self.meter.seconds:.1f} MB/s"
        )
        warnings = (f"  warning: {each}" for each in self.report.warnings)
        for line in (*self.report.lines(), *warnings, *(f"  skipped {each}" for each in self._skipped())):
            self.meter.say(line)

    def _skipped(self) -> list[str]:
        """The first rows and files that were skipped."""
        tally = self.reader.tally
        files = [f"{path}: {reason}" for path, (_, reason) in tally.unreadable.items()]
        return [*tally.locations, *files[:LOCATIONS_KEPT]]
