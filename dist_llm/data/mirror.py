"""Mirror a remote corpus: create a local corpus directory whose shards stay remote until they are read.

The cache contains:

    CACHE/shards/SHA256      token ids; the file is named by the hash of its content
    CACHE/offsets/KEY        document offsets; the key is a hash of their URL and of the hash of their shard
    CACHE/corpora/KEY/       the mirror: manifest.json (with the URL of each file), tokenizer.json, and the file `url`

The key of a mirror is a hash of the URL and the manifest of the corpus. A changed corpus gets a new mirror.
"""

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dist_llm.data.remote import convert_write_errors, fetch
from dist_llm.data.shard import MANIFEST_FILE, SPLITS, CorpusManifest, Shard
from dist_llm.data.tokenizer_file import TOKENIZER_FILE
from dist_llm.io.atomic import PARTIAL_SUFFIX, TargetExistsError, create_atomically
from dist_llm.io.urls import as_path, is_remote, iter_blocks, with_retries

ORIGIN_FILE = "url"


def localize_corpus(location: str, cache: str) -> Path:
    """Return the local directory of the corpus at `location`. If it is a URL, create a mirror without the shards.

    Raises DataError if there is no corpus at the URL.
    """
    if not is_remote(location):
        return as_path(location)
    url, mirrors = location.rstrip("/"), as_path(cache).expanduser() / "corpora"
    manifest_url = f"{url}/{MANIFEST_FILE}"
    content = with_retries(manifest_url, lambda: b"".join(iter_blocks(manifest_url)), lambda: _build_hint(url, mirrors))
    mirror = mirrors / hashlib.sha256(f"{url}\n".encode() + content).hexdigest()
    if not mirror.exists():
        manifest = CorpusManifest.parse(content, manifest_url)
        with (
            convert_write_errors(mirror),
            suppress(TargetExistsError),  # another process created it first
            create_atomically(mirror, shared=True) as directory,
        ):
            directory.mkdir(parents=True)
            fetch(f"{url}/{TOKENIZER_FILE}", directory / TOKENIZER_FILE, None, f"sha256:{manifest.tokenizer_sha256}")
            (directory / ORIGIN_FILE).write_text(url + "\n", encoding="utf-8")
            shards = {
                split: tuple(_with_absolute_paths(shard, url) for shard in manifest.shards[split]) for split in SPLITS
            }
            replace(manifest, shards=shards).save(directory)
    return mirror


def fetch_shard(directory: Path, shard: Shard, num_bytes: int, cache: str) -> Path:
    """Fetch a shard of `num_bytes` bytes into the cache if it is remote, and return its path.

    Raises DataError if the fetch fails.
    """
    if not is_remote(shard.file):
        return directory / as_path(shard.file)
    return fetch(shard.file, _cache_path(cache, "shards", shard.sha256), num_bytes, f"sha256:{shard.sha256}")


def fetch_offsets(directory: Path, shard: Shard, num_bytes: int, cache: str) -> Path:
    """Fetch the offsets file of a shard if it is remote, and return its path, as `fetch_shard` does for the shard."""
    location = shard.offsets_file
    if not is_remote(location):
        return directory / as_path(location)
    key = hashlib.sha256(f"{location}\n{shard.sha256}".encode()).hexdigest()
    return fetch(location, _cache_path(cache, "offsets", key), num_bytes, expected_hash=None)


def _cache_path(cache: str, kind: str, key: str) -> Path:
    return as_path(cache).expanduser() / kind / key


def _with_absolute_paths(shard: Shard, url: str) -> Shard:
    """Return the shard with its relative file names replaced by URLs."""
    file, offsets = (
        location if is_remote(location) or location.startswith(("/", "file://")) else f"{url}/{location}"
        for location in (shard.file, shard.offsets_file)
    )
    return replace(shard, file=file, offsets=offsets)


def _build_hint(url: str, mirrors_dir: Path) -> str:
    """Return a hint for an unreachable manifest: use the newest local mirror, if there is one."""
    origins = (origin for origin in mirrors_dir.glob(f"*/{ORIGIN_FILE}") if origin.parent.suffix != PARTIAL_SUFFIX)
    mirrors = [origin for origin in origins if origin.read_text(encoding="utf-8").strip() == url]
    if mirrors:
        newest = max(mirrors, key=lambda origin: origin.stat().st_mtime).parent
        return f"Check the network, or set data.path to the local mirror: {newest}"
    return "Check the URL, the network and your credentials, or copy the corpus to a disk and set data.path to it."
