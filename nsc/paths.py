"""Paths that mean the same from every folder, and the folder in which one process puts a result together."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from nsc.errors import NSCError

try:
    import fcntl
except ImportError:  # Windows, which cannot lock a folder
    fcntl = None  # type: ignore[assignment]

CHECKPOINT, STAGING = "checkpoint.pt", "unproven"
LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins
_HELD: dict[Path, tuple[int, int]] = {}  # folder -> the process and thread that hold it


def absolute(place: str | Path) -> str:
    """Return a path that means the same from every folder.

    Args:
        place: a path, or a name that is no path, such as one of the Hub.

    Returns:
        The absolute path of what exists, anything else unchanged.
    """
    return str(Path(place).resolve()) if os.path.exists(place) else str(place)


def digest_of_file(file: Path) -> str:
    """Return a digest of a file, of which a part at a time is in memory.

    Args:
        file: the file.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def lfs_remedy(file: Path) -> str | None:
    """Return what to do about a file that Git LFS left in place of what it stands for.

    Args:
        file: any file.

    Returns:
        That it is such a pointer, with the remedy; None for any other file, or none.
    """
    try:
        with file.open("rb") as opened:
            pointer = opened.read(len(LFS)) == LFS
    except OSError:
        return None
    return "it is a Git LFS pointer instead of the weights: run `git lfs pull` in its repository" if pointer else None


def partial_folder(out: Path) -> Path:
    """Return the folder in which a result is put together before it is moved into place.

    Args:
        out: the folder that the result will have.

    Returns:
        The folder beside it, with ``.partial`` after its name.

    Raises:
        NSCError: if ``out`` has no name of its own.
    """
    if out.name in ("", ".."):
        raise NSCError(f"{str(out)!r} is no name of a new folder; choose another")
    return out.with_name(out.name + ".partial")


@contextmanager
def held(out: Path) -> Iterator[Path]:
    """Hold ``out.partial`` for this thread alone, so that no other merge writes there; the same thread may nest it.

    The lock is one of the operating system on the folder itself, and ends with its process, however that ends.

    Args:
        out: the folder that the result will have.

    Yields:
        ``out.partial``, which is made if need be. If nothing is left in it at the end, it is removed again, with the
        parents that were made for it.

    Raises:
        NSCError: naming the process that holds it, or why the folder cannot be made.
    """
    folder, owner = partial_folder(out).absolute(), (os.getpid(), threading.get_ident())
    if _HELD.get(folder) == owner:
        yield folder
        return
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        handle = _lock(folder)
    except (OSError, ValueError) as error:
        _remove_empty(missing)
        raise NSCError(f"{out} cannot be written: {_cause(error, folder)}; choose another folder") from error
    _HELD[folder] = owner
    try:
        yield folder
    finally:
        del _HELD[folder]
        _remove_empty([folder, *missing[1:]])
        os.close(handle)


def states_of_files(folder: Path, depth: int = 1) -> dict[Path, tuple[int, ...]]:
    """Return what changes of files when they are written or replaced.

    Args:
        folder: where they lie.
        depth: 1 for its own files, 2 for those of its sub-folders as well.

    Returns:
        File -> its inode, size and time of change.
    """
    files = [file for level in range(depth) for file in folder.glob("*/" * level + "*") if file.is_file()]
    states = {file: file.stat() for file in files}
    return {file: (state.st_ino, state.st_size, state.st_mtime_ns) for file, state in states.items()}


def states_of_sources(*places: str | Path) -> dict[Path, tuple[int, ...]]:
    """Return what changes of the weights and configs in folders when they are written or replaced.

    Args:
        places: folders; names of the Hub, whose files do not change, are passed over.

    Returns:
        File -> its state, as ``states_of_files`` has it.
    """
    folders = [Path(place).expanduser() for place in places]
    found = [states_of_files(folder, 2) for folder in folders if folder.is_dir()]
    read = (".safetensors", ".json")
    return {file: state for states in found for file, state in states.items() if file.suffix in read}


def refuse_changed(before: Mapping[Path, tuple[int, ...]]) -> None:
    """Refuse to go on if files are no longer what they were.

    Args:
        before: what ``states_of_sources`` returned.

    Raises:
        NSCError: naming a file that was changed, replaced or removed since.
    """
    now = {file: state for folder in {f.parent for f in before} for file, state in states_of_files(folder).items()}
    if changed := sorted(file for file, state in before.items() if now.get(file) != state):
        raise NSCError(f"{changed[0]} was changed while it was merged, so the merge may hold some of each: merge again")


def write_through(folder: Path) -> None:
    """Have the system write all files of a folder to the disk, and the folder itself, so that a power cut loses none.

    Args:
        folder: with all that lies below it.
    """
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def move_into_place(folder: Path, out: Path) -> None:
    """Move a folder that is complete to its final name, so that after a power cut it is whole or not there.

    Args:
        folder: on the same file system as ``out``.
        out: does not exist yet.
    """
    write_through(folder)
    os.replace(folder, out)
    _sync(out.absolute().parent)


def _sync(path: Path) -> None:
    with suppress(PermissionError):  # Windows opens no folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(folder: Path) -> int:
    """A handle that locks a folder, which is made if need be. Raises OSError or ValueError."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):  # which a kill would not leave behind
            pass
        if fcntl is None:
            return os.open(os.devnull, os.O_RDONLY)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except FileNotFoundError:
            pass  # its last holder removed it meanwhile
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def _cause(error: Exception, folder: Path) -> str:
    """Why a folder could not be locked, in words."""
    if not isinstance(error, BlockingIOError):
        return f"{folder} cannot be made or written ({error})"
    return f"another merge is at work in {folder} ({_holder(folder)}); wait until it ends"


def _holder(folder: Path) -> str:
    """The process that locks a folder, by /proc/locks where there is one."""
    with suppress(OSError):
        inode = str(folder.stat().st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            parts = line.split()
            if "FLOCK" in parts and parts[5].rpartition(":")[2] == inode:
                return f"process {parts[4]}"
    return "another process"


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError, ValueError):  # somebody else's files lie there
            folder.rmdir()
