"""Atomic writes of files, and locks between processes."""

import hashlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# No write takes a day, so an older temporary file has no living writer.
ABANDONED_S = 24 * 60 * 60


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` if the block succeeds and removed if it raises.

    The name is unique across processes and machines that share the folder. The file gets the permissions of the user's
    umask, so that other users can read a shared results folder. A killed process leaves its temporary file behind;
    `remove_leftovers` removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != permissions:  # safetensors makes files that only their owner can read
            temporary.chmod(permissions)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name tells which disk is full
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """sha256 hex of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove temporary files of killed processes that wrote `name` (a file name or a pattern) in `folder`.

    Call it with the lock under which `name` is written: then no living process of this machine writes it. On some file
    systems locks do not reach other machines, so files of other machines are removed only when a day old.
    """
    for leftover in folder.glob(f".{name}.*.tmp"):
        try:
            of_this_machine = f".{socket.gethostname()}." in leftover.name
            if of_this_machine or time.time() - leftover.stat().st_mtime > ABANDONED_S:
                leftover.unlink()
        except FileNotFoundError:  # its writer on another machine has finished
            continue


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock `<path>.lock` between processes; log one line if another process holds it.

    The lock is flock(2): the operating system releases it when the process ends, also when it is killed. The file
    remains and has no meaning. The lock reaches other machines over NFS (unless mounted with local_lock=flock) and over
    file systems with cluster-wide flock. Elsewhere two machines may compute the same entry twice. This does no harm:
    files are replaced atomically and have the same content. Without flock, filelock warns and uses the file's existence
    as the lock; the log line names the file, so that the file of a killed process can be deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    inter_process = FileLock(f"{path}.lock")
    try:
        inter_process.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process, which holds %s.lock", path)
        inter_process.acquire()
    try:
        remove_leftovers(path.parent, path.name)
        yield
    finally:
        inter_process.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds the `lock` of `path` now; False if this user has no permission to check."""
    file = Path(f"{path}.lock")
    if not file.exists():
        return False
    probe = FileLock(file)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # no permission
        return False
    probe.release()
    return False
