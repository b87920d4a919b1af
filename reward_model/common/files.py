# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: flushed to the disk, and renamed into their place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BLOCK = 1 << 20  # bytes read at a time


def flush_folder(folder: Path) -> None:
    """See to it that the names in a folder are on the disk; file systems that cannot are left alone."""
    with suppress(OSError):  # some network file systems open no folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_file(path: Path) -> None:
    """See to it that the content of a file is on the disk. Raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_tree(folder: Path) -> None:
    """Flush every file and folder under a folder, and itself. Raises OSError."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush_file(Path(place, name))
        flush_folder(Path(place))


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that its name always has the old content or the new, after a crash too. Raises OSError."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush_folder(path.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder; whatever ends this process meanwhile, nobody finds a part of it under its name."""
    aside = folder.with_name(f".{folder.name.lstrip('.')}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, aside)
        flush_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The hash of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class HashedFile:
    """A file being written, the hash of what was written to it, and its size in bytes.

    error: of a write that failed, whatever became of the exception on its way through native code.
    """

    def __init__(self, file):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data) -> int:
        """As of a binary file."""
        data = memoryview(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.size += data.nbytes
        return data.nbytes

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Open a new file to write; at the end it is on the disk. Raises OSError."""
    with path.open("wb", buffering=BLOCK) as file:
        hashed = HashedFile(file)
        yield hashed
        file.flush()
        os.fsync(file.fileno())
