"""File locks: several runs may share a folder, and each group of cells is computed by one of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from filelock import FileLock, Timeout

from audit.errors import EnvironmentFault

_FOLDER, _TRIES = ".locks", 10


@contextmanager
def lock(folder: Path, name: str, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a name in a run folder while the block runs, and give whether it is held.

    With `wait` the block starts once the lock is free; without, at once. The lock ends with its process. On a file
    system without locks it counts as held: a cell may be computed twice, to the same record.
    Raises EnvironmentFault if the folder cannot be written to.
    """
    file = FileLock(folder / _FOLDER / name)
    held = _acquired(file, wait=wait)
    try:
        yield held
    finally:
        file.release()


def remove_locks(folder: Path) -> None:
    """Delete the lock files of a run folder whose cells all have records."""
    rmtree(folder / _FOLDER, ignore_errors=True)


def _acquired(file: FileLock, *, wait: bool) -> bool:
    place = Path(file.lock_file).parent
    for _ in range(_TRIES):
        try:
            place.mkdir(parents=True, exist_ok=True)
            file.acquire(timeout=-1 if wait else 0)
        except Timeout:
            return False
        except NotImplementedError:
            return True
        except (FileNotFoundError, FileExistsError):  # another run finished just now and deleted the folder
            continue
        except OSError as error:
            raise EnvironmentFault(f"cannot write to {place.parent}: {error.strerror or error}") from error
        return True
    raise EnvironmentFault(f"cannot write to {place.parent}: {place.name} was deleted {_TRIES} times by other runs")
