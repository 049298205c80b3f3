"""Mirror a remote corpus: create a local corpus directory whose shards stay remote until they are read.

    CACHE/shards/SHA256      a file of token ids, named by its content
    CACHE/offsets/KEY        document offsets; the key is a hash of their URL and the shard's hash
    CACHE/corpora/KEY/       manifest.json (with the URL of each file), tokenizer.json, and `url`: the corpus's URL

The key of a corpus is a hash of its URL and manifest: if the remote corpus changes, it gets a new mirror.
"""

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dist_llm.data.remote import convert_write_errors, fetch
from dist_llm.data.shard import MANIFEST, SPLITS, Manifest, Shard
from dist_llm.data.tokenizer_file import TOKENIZER
from dist_llm.io.atomic import SUFFIX, TargetExistsError, create_atomically
from dist_llm.io.urls import as_path, is_remote, iter_blocks, with_retries

ORIGIN_FILE = "url"


def localize_corpus(location: str, cache: str) -> Path:
    """Return the directory of the corpus at `location`. For a URL it is a mirror without the shards.

    Raises DataError if the URL has no corpus.
    """
    if not is_remote(location):
        return as_path(location)
    url, corpora = location.rstrip("/"), as_path(cache).expanduser() / "corpora"
    address = f"{url}/{MANIFEST}"
    content = with_retries(address, lambda: b"".join(iter_blocks(address)), lambda: _build_hint(url, corpora))
    mirror = corpora / hashlib.sha256(f"{url}\n".encode() + content).hexdigest()
    if not mirror.exists():
        manifest = Manifest.parse(content, address)
        with (
            convert_write_errors(mirror),
            suppress(TargetExistsError),  # another process created it first
            create_atomically(mirror, shared=True) as directory,
        ):
            directory.mkdir(parents=True)
            fetch(f"{url}/{TOKENIZER}", directory / TOKENIZER, None, f"sha256:{manifest.tokenizer_sha256}")
            (directory / ORIGIN_FILE).write_text(url + "\n", encoding="utf-8")
            shards = {
                split: tuple(_with_absolute_paths(shard, url) for shard in manifest.shards[split]) for split in SPLITS
            }
            replace(manifest, shards=shards).save(directory)
    return mirror


def locate_shard(directory: Path, shard: Shard, size: int, cache: str) -> Path:
    """Return the path of the shard's file of `size` bytes, fetched if it is remote. Raises DataError if the fetch
    fails."""
    if not is_remote(shard.file):
        return directory / as_path(shard.file)
    return fetch(shard.file, _cache_path(cache, "shards", shard.sha256), size, f"sha256:{shard.sha256}")


def locate_offsets(directory: Path, shard: Shard, size: int, cache: str) -> Path:
    """Return the path of the shard's offsets file of `size` bytes, fetched if it is remote. Raises DataError if that
    fails."""
    location = shard.offsets_file
    if not is_remote(location):
        return directory / as_path(location)
    key = hashlib.sha256(f"{location}\n{shard.sha256}".encode()).hexdigest()
    return fetch(location, _cache_path(cache, "offsets", key), size, None)


def _cache_path(cache: str, kind: str, key: str) -> Path:
    return as_path(cache).expanduser() / kind / key


def _with_absolute_paths(shard: Shard, url: str) -> Shard:
    """Return the shard with its relative file names replaced by URLs."""
    file, offsets = (
        location if is_remote(location) or location.startswith(("/", "file://")) else f"{url}/{location}"
        for location in (shard.file, shard.offsets_file)
    )
    return replace(shard, file=file, offsets=offsets)


def _build_hint(url: str, corpora: Path) -> str:
    """Return a hint for an unreachable manifest: use the newest local mirror, if there is one."""
    origins = (origin for origin in corpora.glob(f"*/{ORIGIN_FILE}") if origin.parent.suffix != SUFFIX)
    mirrors = [origin for origin in origins if origin.read_text(encoding="utf-8").strip() == url]
    if mirrors:
        newest = max(mirrors, key=lambda origin: origin.stat().st_mtime).parent
        return f"Check the network, or set data.path to the local mirror: {newest}"
    return "Check the URL, the network and your credentials, or copy the corpus to a disk and set data.path to it."
