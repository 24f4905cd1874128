"""Files written so that a kill or a full disk loses nothing that was there before."""
import errno
import glob
import hashlib
import json
import os
import shutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime import distributed
from runtime.config import fail


def open_folder(out: str) -> Path:
    """Make the folder a command is to write in, before it takes time or money."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    except OSError as error:
        fail(f"{out}: cannot be written ({error.strerror}): choose another out=")
    return folder


def lock_file(file: typing.IO | int, wait: bool = False) -> None:
    """Lock an open file or folder until it is closed. BlockingIOError if another process has it, unless we `wait`."""
    import fcntl  # Windows has none: load_config says so

    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def writing(path: Path, beside: Path | None = None, together: bool = False) -> Iterator[None]:
    """A disk that is full, or does not let us write, ends the run with one line. What is half written `beside` goes.

    Rank 0 alone writes, or two ranks would rename one file beside; `together` they each write what is theirs.
    """
    if distributed.rank() and not together:
        raise ValueError(f"{path}: rank {distributed.rank()} is about to write it, expected rank 0 alone")
    try:
        yield
    except BaseException as error:  # Ctrl-C, too
        with suppress(OSError):
            if beside is not None and distributed.rank() == 0:
                shutil.rmtree(beside) if beside.is_dir() else beside.unlink()
        if not isinstance(error, OSError | SafetensorError):
            raise
        fail(f"{path}: cannot be written ({error}): free some space or write elsewhere; what was saved before is whole")


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[Path]:
    """A file beside, to be renamed once it is written: a kill at any moment leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}{writer and '.' + writer}.new")
    with writing(path, beside):
        yield beside
        beside.replace(path)


def sync_folder(folder: Path) -> None:
    """Return when the names in the folder are safe on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole. Rank 0 does."""
    if not distributed.rank():
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")


def files_of(path: Path) -> list[Path]:
    """A file; the files of a folder, or of a pattern, by name."""
    if not path.is_dir():
        return [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if (path / "config.json").exists():  # a checkpoint: what lies below it is not read, and may be another one
        return sorted(path.iterdir())
    return sorted(file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))


def file_hash(*paths: str | Path) -> str:
    """sha256 over files, folders and patterns, as 16 hex digits."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        for file in files_of(path):
            if file.is_file():
                digest.update(file.name.encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def read_cache(file: Path, what: str, made_from: dict[str, str], remedy: str) -> Tensor:
    """The sums that write_cache has kept; exits with one line if they were made from anything else."""
    try:
        with safe_open(file, framework="pt") as cache:
            stored, sums = json.loads((cache.metadata() or {}).get("made_from", "{}")), cache.get_tensor("sums")
    except (SafetensorError, OSError, ValueError) as error:
        fail(f"{file}: is no cache of {what} ({error}): {remedy}")
    for source, value in made_from.items():
        if stored.get(source) != value:
            fail(f"{file}: was computed from another {source}: {remedy}")
    return sums


def write_cache(file: Path, sums: Tensor, made_from: dict[str, str], run: Path) -> None:
    """Keep sums beside what they were made from: one metadata entry, since safetensors orders several at random.

    Several runs may do so at once: each writes a file of its own beside, and the last one stays.
    """
    if not distributed.rank():
        with replacing(file, hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]) as beside:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"sums": sums}, beside, metadata={"made_from": json.dumps(made_from)})
