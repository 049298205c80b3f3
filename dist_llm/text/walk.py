"""Walk the folders of `prepare --source` and select the files to read.

A file is selected by its name, by --include and --exclude, and if it is readable. `InputFileCounts` counts each file as
read or as skipped for a reason. An unreadable file or folder raises DataError, unless --skip-unreadable is set.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dist_llm.errors import DataError
from dist_llm.text.compression import CODECS
from dist_llm.text.report import InputFileCounts

# Suffixes of files with rows. A README or LICENSE in the same folder as such files is not part of the corpus.
ROW_SUFFIXES = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow"}
UNSUPPORTED_COMPRESSION = {
    ".lz4",
    ".lzma",
    ".br",
    ".7z",
    ".zip",
    ".rar",
    ".tar",
    ".tgz",
    ".tbz",
    ".tbz2",
    ".txz",
    ".z",
    ".lzo",
    ".sz",
}
CHECKSUMS = ("*.md5", "*.sha1", "*.sha256", "*.sha512", "*.crc32", "*.asc", "*.sig", "md5sums*", "sha*sums*")
BACKUPS = ("*~", "#*#", "*.bak", "*.orig", "*.rej", "*.swp", "*.swo", "*.tmp", "*.partial")
ABOUT_FILES = ("readme", "readme.*", "license", "license.*", "licence", "licence.*", "citation.*", "changelog.*")
PYTHON_CACHE_FOLDERS = frozenset({"__pycache__"})
MAX_LISTED = 5  # maximum number of unreadable files that an error message lists


@dataclass(frozen=True)
class FileRules:
    """The options that select files. A glob matches the name of a file or its path below the folder; `*` matches `/`.

    An empty `include` matches all files.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_unreadable: bool = False


def get_data_suffix(path: Path) -> str:
    """Return the lower-case suffix that selects the reader: for a compressed file a.jsonl.gz it is .jsonl."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in CODECS else suffix


def find_read_problem(path: Path) -> str | None:
    """Return why a file cannot be read, or None. The content of the file is not checked."""
    if not path.exists():
        return "a broken link" if path.is_symlink() else "missing"
    if not path.is_file():
        return "not a regular file"
    if not os.access(path, os.R_OK):
        return "no permission"
    if path.suffix.lower() in UNSUPPORTED_COMPRESSION:
        return f"compressed as {path.suffix}, which is not supported (only {', '.join(sorted(CODECS))})"
    return None


class FolderWalk:
    """Selects and counts the files of all sources of a run, and records unreadable files and unused globs."""

    def __init__(self, rules: FileRules, file_counts: InputFileCounts) -> None:
        self.rules, self.file_counts = rules, file_counts
        self._unreadable: list[str] = []  # path and reason
        self._used_globs: set[str] = set()

    def select_file(self, path: Path) -> bool:
        """Return whether a file is readable, and count it as read or as skipped. No glob applies."""
        if reason := find_read_problem(path):
            self._record_unreadable(path, reason)
            return False
        self.file_counts.add("read", path, _get_file_bytes(path))
        return True

    def walk_folder(self, root: Path, excluded_folders: Iterable[str] = ()) -> list[Path]:
        """Return the selected files below `root`, sorted by relative path."""
        files, folders_to_skip = [], PYTHON_CACHE_FOLDERS | set(excluded_folders)
        all_files = self._iter_files(root, folders_to_skip)
        for path in sorted(all_files, key=lambda file: file.relative_to(root).as_posix()):
            relative_path = path.relative_to(root).as_posix()
            if self._matches(relative_path, self.rules.exclude):
                self._skip("--exclude", path)
            elif self.rules.include and not self._matches(relative_path, self.rules.include):
                self._skip("not in --include", path)
            else:
                files.append(path)
        data_suffixes = {
            get_data_suffix(path) for path in files if not _matches_name(path, (*ABOUT_FILES, *CHECKSUMS, *BACKUPS))
        }
        return [path for path in files if self._may_be_data(path, data_suffixes) and self.select_file(path)]

    def check(self) -> None:
        """Raise DataError if a file is unreadable, or a glob matched nothing."""
        if self._unreadable and not self.rules.skip_unreadable:
            num_unlisted = len(self._unreadable) - MAX_LISTED
            more = f"\n  and {num_unlisted} more" if num_unlisted > 0 else ""
            raise DataError(
                f"{len(self._unreadable)} files or folders of --source cannot be read:\n  "
                + "\n  ".join(self._unreadable[:MAX_LISTED])
                + f"{more}\nFix them, leave them out (in a folder, with --exclude), or skip them with "
                "--skip-unreadable."
            )
        for option, globs in (("--include", self.rules.include), ("--exclude", self.rules.exclude)):
            if unused_globs := [glob for glob in globs if glob not in self._used_globs]:
                raise DataError(
                    f"{option} {unused_globs[0]}: matches no file in the folders of --source. Quote the glob, so that "
                    "the shell does not expand it. A glob matches the name of a file or its path below the folder."
                )

    def _iter_files(self, root: Path, folders_to_skip: frozenset[str] | set[str]) -> Iterator[Path]:
        """Yield all files below `root`. A linked folder is skipped if it is read under another path."""
        real_root, folders, visited = os.path.realpath(root), [root], set()
        while folders:
            folder = folders.pop()
            real_folder = os.path.realpath(folder)
            if real_folder in visited:
                self._skip("folder read already", folder)
                continue
            visited.add(real_folder)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
            except OSError as error:
                self._record_unreadable(folder, error.strerror or str(error))
                continue
            for entry in entries:
                path = Path(folder, entry.name)
                if entry.name.startswith("."):
                    self._skip("hidden", path)
                elif not os.path.isdir(path):
                    yield path
                elif entry.name in folders_to_skip:
                    self._skip("Python cache" if entry.name in PYTHON_CACHE_FOLDERS else "excluded folder", path)
                elif entry.is_symlink() and _are_nested(os.path.realpath(path), real_root):
                    self._skip("folder read already", path)
                else:
                    folders.append(path)

    def _matches(self, relative_path: str, globs: Sequence[str]) -> bool:
        name = relative_path.rpartition("/")[2]
        matches = [glob for glob in globs if fnmatchcase(name, glob) or fnmatchcase(relative_path, glob)]
        self._used_globs.update(matches)
        return bool(matches)

    def _may_be_data(self, path: Path, data_suffixes: set[str]) -> bool:
        """Return whether a file may be data, judging by its name. Files that --include matches are always data.

        `data_suffixes` are the suffixes of the other files. A README or LICENSE is data only if the other files are
        text files with the same suffix.
        """
        if self.rules.include:
            return True
        describes_data = bool(data_suffixes) and (
            get_data_suffix(path) not in data_suffixes or bool(data_suffixes & ROW_SUFFIXES)
        )
        rules = (
            ("checksum", CHECKSUMS, True),
            ("editor backup", BACKUPS, True),
            ("README or LICENSE", ABOUT_FILES, describes_data),
        )
        for reason, globs, is_active in rules:
            if is_active and _matches_name(path, globs):
                self._skip(reason, path)
                return False
        return True

    def _record_unreadable(self, path: Path, reason: str) -> None:
        self._unreadable.append(f"{path}: {reason}")
        self._skip("unreadable", path)

    def _skip(self, reason: str, path: Path) -> None:
        self.file_counts.add(f"skipped: {reason}", path, _get_file_bytes(path))


def _matches_name(path: Path, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(path.name.lower(), glob) for glob in globs)


def _are_nested(first: str, second: str) -> bool:
    """Return whether two folders are equal or one contains the other."""
    return f"{first}/".startswith(f"{second}/") or f"{second}/".startswith(f"{first}/")


def _get_file_bytes(path: Path) -> int:
    """Return the size of a file in bytes; 0 for a folder and for a missing file."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
