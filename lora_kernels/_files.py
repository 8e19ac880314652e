"""Files: JSON that others may have written, changed or cut off; and writes that are whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    import torch

_NUMBERS = itertools.count()
_TAIL = 2**16  # bytes read at once from the end of a file
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def parse_json(text: str | bytes, where: object) -> Any:
    """The value of a JSON text in UTF-8; the error names `where` it is from."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{where} cannot be read: its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def read_json(file: Path, what: str | None = None) -> Any:
    """The value in a JSON file; the error calls it `what`, by default its path."""
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{what or file} cannot be read: {error.strerror or error}") from error
    return parse_json(text, what or file)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path of the same suffix that then replaces the file, whole; links stay, and the folder is created."""
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _temporary(target)
    try:
        fresh.touch()
        mode = (target if target.exists() else fresh).stat().st_mode
        yield fresh
        fresh.chmod(mode)  # safetensors' files are for their owner alone
        _flush(fresh)
        os.replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _flush(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, as `replacing` does."""
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, as `replacing` does; an OSError if it cannot be written."""
    from safetensors import SafetensorError  # noqa: PLC0415  (slow to import)
    from safetensors.torch import save_file  # noqa: PLC0415

    with replacing(path) as fresh:
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, fresh, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[Path]:
    """Yield a file's resolved path while other processes that ask likewise wait; its folder is created."""
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield target


def append_line(path: str | Path, line: str) -> None:
    """Append a line in UTF-8 to a file; a last line that was cut off (a killed process) is removed first."""
    with locked(path) as target, target.open("ab+") as file:
        size = file.tell()
        while size > 0:
            start = max(0, size - _TAIL)
            file.seek(start)
            end = start + file.read(size - start).rfind(b"\n") + 1
            if end > start or start == 0:
                file.truncate(end)
                break
            size = start
        file.write(f"{line}\n".encode())


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to write to; at any moment the real one has all of the old files or all of the new ones."""
    # Its other files stay. Linux exchanges two folders in one step, on most file systems. Elsewhere the old folder is
    # moved to a hidden name beside it first. A folder that cannot be moved (a mount, the working directory) gets the
    # files one by one, and is without the first of them meanwhile: it cannot be read as a mixture.
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _temporary(target)
    try:
        try:
            fresh.mkdir()
        except OSError:
            if not target.is_dir():
                raise
            fresh = _temporary(target / "files")
            fresh.mkdir()
        yield fresh
        for file in fresh.iterdir():
            if file.is_file():
                file.chmod(fresh.stat().st_mode & 0o666)
            _flush(file)
        _flush(fresh)
        _take_place(fresh, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _take_place(fresh: Path, target: Path) -> None:
    """Give a folder the files of another, which is then the old one, or empty."""
    names = sorted(os.listdir(fresh))
    if fresh.parent == target.parent and not _is_current(target):
        with contextlib.suppress(OSError):
            return os.rename(fresh, target)  # there is none yet, or an empty one

        def replaced(folder: Any, _: list[str]) -> list[str]:
            return names if Path(folder) == target else []

        shutil.copytree(target, fresh, True, replaced, _link, dirs_exist_ok=True)  # the other files, as links
        with contextlib.suppress(OSError):
            return _exchange(fresh, target)
        old = fresh.with_suffix(".old")
        with contextlib.suppress(OSError):
            os.rename(target, old)
            os.rename(fresh, target)
            return shutil.rmtree(old, ignore_errors=True)
    if not names:
        return None
    (target / names[0]).unlink(missing_ok=True)
    for name in (*names[1:], names[0]):
        os.replace(fresh / name, target / name)
    return None


def _is_current(folder: Path) -> bool:
    """Whether the working directory is a folder or in it."""
    with contextlib.suppress(FileNotFoundError):
        return Path.cwd().is_relative_to(folder)
    return False


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Exchange what two paths name, in one step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _temporary(target: Path) -> Path:
    """A hidden name beside a path that tells whose it is; those of processes that are no more are removed."""
    begin, end = f".{target.stem}.{socket.gethostname()}-", f".part{target.suffix}"
    for stale in target.parent.glob(f"{glob.escape(begin)}*{glob.escape(end)}"):
        process = stale.name.removeprefix(begin).partition("-")[0]
        if process.isdigit() and not _runs(int(process)):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    return target.with_name(f"{begin}{os.getpid()}-{next(_NUMBERS)}{end}")


def _runs(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
