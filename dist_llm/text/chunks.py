"""Documents in chunks, few and large, with a mark wherever whole input files end.

What was read up to a mark, and written, need not be read again by a run that goes on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_llm.text.input_files import InputFile
from dist_llm.text.rows import Document, Tally
from dist_llm.text.tokenizer import ENDOFTEXT

COUNTS = ("empty_documents", "documents_of", "end_token_origin", "end_token_documents")
CHUNK_CHARS = 1 << 20
DOCUMENT_OVERHEAD_CHARS = 64  # so that a chunk of tiny documents is not a million objects
# A mark makes all files durable, which costs as much as tokenizing a tenth of this. Input files smaller
# than this share a mark with their neighbours.
RESUME_POINT_CHARS = 8 << 20


@dataclass(frozen=True)
class ResumePoint:
    """Input files finished since the last mark, as `Source.state` describes them, and the counts up to here."""

    inputs: list[list[str | int] | None]
    counts: dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Texts, none of them empty, the `file:line` of each and the length of its prompt; `mark` if an input file ends
    with them."""

    texts: list[str] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    resume_point: ResumePoint | None = None
    prompts: list[int] = field(default_factory=list)  # characters


class ChunkReader:
    """Reads sources one after the other."""

    def __init__(self, sources: Sequence[InputFile], tally: Tally) -> None:
        self.sources, self.tally = sources, tally
        self.empty_documents = self.end_token_documents = 0
        self.end_token_origin = ""  # of the first document that has the end token's text
        self.documents_of: dict[str, int] = {}  # by --source

    def iter_chunks(self) -> Iterator[Chunk]:
        chunk, chars, unmarked, inputs = Chunk(), 0, 0, []
        for source in self.sources:
            state = source.state  # from before: a file that changes while it is read does not pass for read
            for document in source.documents(self.tally):
                self._count_document(document, source.spec)
                if not document.text:
                    self.empty_documents += 1
                    continue
                chunk.texts.append(document.text)
                chunk.origins.append(document.origin)
                chunk.prompts.append(document.prompt_chars)
                size = len(document.text) + DOCUMENT_OVERHEAD_CHARS
                chars, unmarked = chars + size, unmarked + size
                if chars >= CHUNK_CHARS:
                    yield chunk
                    chunk, chars = Chunk(), 0
            inputs.append(state)
            if unmarked >= RESUME_POINT_CHARS:
                yield Chunk(chunk.texts, chunk.origins, ResumePoint(inputs, self._copy_counts()), chunk.prompts)
                chunk, chars, unmarked, inputs = Chunk(), 0, 0, []
        if chunk.texts:
            yield chunk

    def _count_document(self, document: Document, spec: str) -> None:
        """Keep what tells that documents were not kept apart."""
        self.documents_of[spec] = self.documents_of.get(spec, 0) + 1
        if ENDOFTEXT in document.text:
            self.end_token_origin = self.end_token_origin or document.origin
            self.end_token_documents += 1

    def list_warnings(self, whole: bool) -> list[str]:
        """What hints at several documents in one; `whole`: this run reads every source to its end."""
        found = []
        if single := [spec for spec, count in self.documents_of.items() if whole and count == 1]:
            found.append(
                f"--source {single[0]} is a single document. If it is a text file that holds many, give --separator "
                "STRING, or --separator blank-lines"
            )
        if self.end_token_documents:
            found.append(
                f"{self.end_token_documents:,} documents contain the text {ENDOFTEXT}, as {self.end_token_origin}: it "
                f"is encoded like any text and ends no document. If it does, give --separator '{ENDOFTEXT}'"
            )
        return found

    def _copy_counts(self) -> dict[str, Any]:
        tally = asdict(self.tally)
        del tally["max_bad_rate"], tally["share"], tally["skip_unreadable"]
        return {"tally": tally, **{name: getattr(self, name) for name in COUNTS}}

    def restore(self, files: int, counts: dict[str, Any]) -> None:
        """Go on after the first `files` sources, with the counts of a mark."""
        self.sources = self.sources[files:]
        for name in COUNTS:
            setattr(self, name, counts[name])
        for name, value in counts["tally"].items():
            setattr(self.tally, name, value)
