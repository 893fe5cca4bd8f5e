"""A run folder has one owner: the process that holds the lock beside it, and says who it is."""
import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from tqdm import tqdm

OWNED = set()  # the run folders of this process


@contextlib.contextmanager
def owned(folder: Path):
    """Own a run folder, and make it; inside of itself, in one process, it changes nothing.

    Of several ranks rank 0 owns it for all. The lock is folder.lock, beside what a link leads to,
    and ends with the process that holds it. ValueError names its owner if that is another process,
    and says so if the folder cannot be written.
    """
    place = folder.resolve()
    if place in OWNED or int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take(Path(f"{place}.lock"), folder)
        os.register_at_fork(after_in_child=lock.close)  # a fork that lives on owns nothing
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}: {error.filename}): see "
                         "output_dir and run_name") from error
    OWNED.add(place)
    try:
        yield
    finally:
        OWNED.remove(place)
        with contextlib.suppress(OSError):  # the folder may be gone
            os.unlink(lock.name)  # before another process can have it
        lock.close()


def take(path: Path, folder: Path):
    """The locked file, with the name of its owner in it; ValueError if another process has it."""
    while True:
        try:
            lock = open(path, "a+")
        except PermissionError:  # that of another user can be locked and removed, but not written
            lock = open(path)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise ValueError(f"{folder} is in use by {owner}: stop it, or choose another "
                             "run_name") from None
        except OSError as error:
            tqdm.write(f"{folder} cannot be locked ({error.strerror}): nothing keeps a second run "
                       "of this name out")
        if not lock.writable():
            path.unlink()
        elif path.exists() and os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, since "
                       f"{time.strftime('%Y-%m-%d %H:%M:%S')}")
            lock.flush()
            return lock
        lock.close()  # its last owner has ended
