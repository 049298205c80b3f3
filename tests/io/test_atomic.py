"""A crash at any moment leaves the old or the new content. Planted bugs show that each step of a write is needed."""

import os

import pytest

from dist_llm.io import atomic
from dist_llm.io.atomic import TargetExistsError, create_atomically, open_replacement, replace_file

NEW = b"new content"


def write_file(target, shared):
    """Replace a file. Yield in the middle of the write."""
    with open_replacement(target, shared) as file:
        file.write(NEW)
        yield


def write_folder(target, shared):
    """Create a folder with a file in a subfolder. Yield in the middle of the write."""
    with create_atomically(target, shared) as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_bytes(NEW)
        yield


def snapshot(directory):
    """Return the content of all files below a directory by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


class Disk:
    """Simulates the disk after a power cut: it has the synced content under the synced names."""

    def __init__(self, monkeypatch):
        self.synced, self.faults, self.unsynced_names = {}, [], set()
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda file: (self._sync(file), fsync(file)))
        monkeypatch.setattr(os, "replace", lambda old, new: (self._rename(old, new), replace(old, new)))

    def _sync(self, file):
        status = os.fstat(file)
        self.synced[status.st_ino] = status.st_size
        self.unsynced_names.discard(status.st_ino)

    def _rename(self, old, new):
        paths = [old, *old.rglob("*")] if old.is_dir() else [old]
        for path in paths:
            if self.synced.get(path.stat().st_ino) != path.stat().st_size:
                self.faults.append(f"{path.name} is renamed before it is synced")
        self.unsynced_names.add(new.parent.stat().st_ino)


def list_faults(write, directory, shared, monkeypatch):
    """Run a write once to the end and once with an error. Return what a reader could see after a crash."""
    target = directory / "target"
    if write is write_file:
        target.write_bytes(b"old")
    before = snapshot(directory)
    disk = Disk(monkeypatch)
    writing = write(target, shared=shared)
    next(writing)
    faults = (
        [] if target.name not in os.listdir(directory) or write is write_file else ["the target is there too early"]
    )
    faults += [f"{name} changes before the end" for name in before if snapshot(directory).get(name) != before[name]]
    with pytest.raises(ZeroDivisionError):
        writing.throw(ZeroDivisionError())
    faults += ["an error changes the content"] if snapshot(directory) != before else []
    if os.listdir(directory) != [name.partition("/")[0] for name in before]:
        faults.append("an error leaves a temporary file")
    list(write(target, shared=shared))
    faults += disk.faults + (["the new name is not synced"] if disk.unsynced_names else [])
    expected = {"target": NEW} if write is write_file else {"target/inner/file": NEW}
    return faults + ([] if snapshot(directory) == expected else [f"the result is {snapshot(directory)}"])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_crash_leaves_the_old_or_the_new_content(write, shared, tmp_path, monkeypatch):
    assert list_faults(write, tmp_path, shared=shared, monkeypatch=monkeypatch) == []


@pytest.mark.parametrize(
    ("name", "bug", "writes", "fault"),
    [
        ("sync_file", lambda file: file.flush(), [write_file], "is renamed before it is synced"),
        ("sync_tree", lambda path: None, [write_folder], "is renamed before it is synced"),
        ("sync_directory", lambda path: None, [write_file, write_folder], "the new name is not synced"),
        ("get_temporary_path", lambda path, shared: path, [write_file, write_folder], "too early|before the end"),
        ("_discard", lambda path: None, [write_file, write_folder], "leaves a temporary file"),
    ],
)
def test_each_planted_bug_is_caught(name, bug, writes, fault, tmp_path, monkeypatch):
    for number, write in enumerate(writes):
        directory = tmp_path / str(number)
        directory.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(atomic, name, bug)
            faults = " ".join(list_faults(write, directory, shared=False, monkeypatch=patch))
        assert any(each in faults for each in fault.split("|")), faults


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_leftovers_of_a_killed_write_are_overwritten(write, tmp_path):
    """The next write starts with an empty file. It contains nothing of the killed write and leaves no other file."""
    killed = write(tmp_path / "target", shared=False)
    next(killed)
    temporary = tmp_path / f"target{atomic.PARTIAL_SUFFIX}"
    left_over = temporary if write is write_file else temporary / "inner" / "stray"
    left_over.write_bytes(b"much more content than the new one has, of a process that was killed")
    list(write(tmp_path / "target", shared=False))
    assert list(snapshot(tmp_path).values()) == [NEW]
    assert os.listdir(tmp_path) == ["target"]
    with pytest.raises(FileNotFoundError):  # the first write is not dead here: its temporary path was renamed
        list(killed)


def test_first_of_two_creators_wins(tmp_path):
    first, second = write_folder(tmp_path / "target", shared=True), write_folder(tmp_path / "target", shared=True)
    next(first), next(second)
    list(first)
    with pytest.raises(TargetExistsError, match=r"File exists.*target"):
        list(second)
    assert snapshot(tmp_path) == {"target/inner/file": NEW}
    assert os.listdir(tmp_path) == ["target"]


def test_last_of_two_replacements_wins(tmp_path):
    with open_replacement(tmp_path / "target", shared=True) as file:
        replace_file(tmp_path / "target", b"other", shared=True)
        file.write(NEW)
    assert snapshot(tmp_path) == {"target": NEW}
