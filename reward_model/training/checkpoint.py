# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the disk: written beside their place, flushed, listed in a manifest, and renamed when all is there.

checkpoints/step-00000040/manifest.json     size and SHA-256 of every other file, and of itself
                          state.json        where the run was, and what it was (:mod:`.resume`)
                          engine/           what DeepSpeed's save_checkpoint writes: model, optimizer, schedule
                          random/           the random states of each rank
                          tokenizer/        as the run uses it, for ``reward-model export``
                          best.safetensors  with --keep_best: the weights of the best evaluation so far
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.files import flush_file, flush_folder, hashed_file, remove_folder, sha256_of, write_whole
from reward_model.common.logging import logger
from reward_model.common.pulse import beat

FOLDER, MANIFEST, STATE, ENGINE, TOKENIZER = "checkpoints", "manifest.json", "state.json", "engine", "tokenizer"
BEST = "best.safetensors"
FORMAT = 1
NAME = re.compile(r"step-(\d+)")
PARTIAL = re.compile(r"\..*\.(partial|removed)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that looks like a checkpoint by its name; :meth:`fault` says whether it is whole."""

    folder: Path

    @property
    def step(self) -> int:
        """Steps of the optimizer that the run had taken."""
        found = NAME.fullmatch(self.folder.name)
        return int(found[1]) if found else -1

    def manifest(self) -> dict[str, Any]:
        """The manifest, which is checked against its own hash.

        Raises:
            UserError: it is not there, torn, altered, or of another format.
        """
        path = self.folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files = content["files"]
            fits = content.pop("sha256") == _hash_of(content) and content["format"] == FORMAT
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a manifest of this version") from error
        if not fits or not isinstance(files, dict) or not all(map(_is_inside, files)):
            raise UserError(f"{path} is altered, or is not a manifest of this version")
        return content

    def fault(self, part: int = 0, parts: int = 1) -> str:
        """Why this is not a whole checkpoint, in a line; empty: it is.

        Args:
            part, parts: which of the files to look at, when processes share them.
        """
        try:
            manifest = self.manifest()
        except UserError as error:
            return str(error)
        files: dict[str, Any] = manifest["files"]
        if missing := {STATE} - set(files):
            return f"its manifest lists no {', '.join(missing)}"
        if NAME.fullmatch(self.folder.name) and manifest.get("step") != self.step:
            return f"its manifest is of step {manifest.get('step')}"
        for name in sorted(files)[part::parts]:
            path = self.folder / name
            try:
                size = path.stat().st_size
                if size != files[name]["bytes"]:
                    return f"{name} has {size} bytes, and {files[name]['bytes']} were written"
                if sha256_of(path) != files[name]["sha256"]:
                    return f"{name} has other bytes than were written"
            except (OSError, KeyError, TypeError, ValueError) as error:  # ValueError: a name that no file can have
                return f"{name}: {getattr(error, 'strerror', None) or 'not described by the manifest'}"
        return ""

    def state(self) -> dict[str, Any]:
        """What the run wrote of itself. Raises UserError if it cannot be read."""
        path = self.folder / STATE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise UserError(f"{path} is no state of a run")
        return found


def _is_inside(name: str) -> bool:
    """Whether a manifest names a file of its own folder."""
    return not os.path.isabs(name) and ".." not in Path(name).parts


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def listed(folder: Path) -> list[Checkpoint]:
    """Those under the ``checkpoints`` of an output folder, whole or not, the newest first."""
    try:
        names = [name for name in os.listdir(folder / FOLDER) if NAME.fullmatch(name)]
    except OSError:
        return []
    return sorted((Checkpoint(folder / FOLDER / name) for name in names), key=lambda each: -each.step)


def newest_whole(folder: Path, context: DistributedContext) -> Checkpoint | None:
    """The newest checkpoint of an output folder that is whole; says of each newer one why it is not.

    Every rank calls it, and each reads a share of the files.
    """
    texts = distributed.from_first([str(each.folder) for each in listed(folder)])
    for each in (Checkpoint(Path(text)) for text in texts):
        fault = distributed.first_text(each.fault(context.rank, context.world_size))
        if not fault:
            return each
        logger.warning(f"{each.folder} is not whole, and is left out: {fault}")
    return None


class Writer:
    """Writes this rank's files of a checkpoint, and keeps what the manifest has to say of them.

    problem: why a file could not be written; empty: all were. The others of that rank are left out then.
    """

    def __init__(self, folder: Path):
        self.folder, self.problem = folder, ""
        self.files: dict[str, dict[str, Any]] = {}

    def write(self, path: Path, write: Callable[[Any], Any]) -> None:
        """Let a function write a file; it is flushed and hashed. A full disk becomes the problem."""
        if self.problem:
            return
        beat(f"to write {path.name}")
        hashed = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with hashed_file(path) as hashed:
                write(hashed)
        except Exception as error:
            # torch's writer has an exception of its own for a write that failed
            cause = error if isinstance(error, OSError) else hashed.error if hashed else None
            if cause is None:
                raise
            self.problem = f"{path}: {cause.strerror or cause}"
            return
        name = path.relative_to(self.folder).as_posix()
        self.files[name] = {"bytes": hashed.size, "sha256": hashed.digest.hexdigest()}

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file of known content."""
        self.write(self.folder / name, lambda file: file.write(content))

    def write_tensors(self, path: str, state: Any) -> None:
        """Write what ``torch.save`` takes."""
        self.write(Path(path), lambda file: torch.save(state, file))

    def link(self, name: str, path: Path) -> None:
        """Let a file of the checkpoint be one that is already on the disk, by another name where that is possible."""
        try:
            os.link(path, self.folder / name)
        except OSError:  # another file system, or one without links
            try:
                shutil.copyfile(path, self.folder / name)
            except OSError as error:
                self.problem = self.problem or f"{path}: {error.strerror}"
                return
        self.files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def commit(
    folder: Path,
    step: int,
    context: DistributedContext,
    versions: dict[str, str],
    write: Callable[[Writer], None],
) -> tuple[Checkpoint, str]:
    """Write a checkpoint into an output folder; every rank calls it.

    Args:
        write: writes this rank's files, and takes part in what all ranks do together.

    Returns:
        The checkpoint, and why it could not be written, in a line; empty: it was.
    """
    place = folder / FOLDER / f"step-{step:08d}"
    staging = place.with_name(f".{place.name}.partial")
    problem = _tried(lambda: _make_anew(staging)) if context.is_first else ""
    if problem := distributed.first_text(problem):
        return Checkpoint(place), problem
    writer = Writer(staging)
    write(writer)
    written = distributed.gather_objects(writer.files)
    problem = distributed.first_text(writer.problem)
    if context.is_first:
        if not problem:
            files = {name: each for part in written for name, each in part.items()}
            manifest = {"format": FORMAT, "step": step, "world_size": context.world_size, "versions": versions}
            problem = _tried(lambda: _finish(staging, place, manifest | {"files": files}))
        if problem:
            shutil.rmtree(staging, ignore_errors=True)
    return Checkpoint(place), distributed.first_text(problem)


def _tried(action: Callable[[], None]) -> str:
    """Do something with files; what stands in its way, in a line."""
    try:
        action()
    except OSError as error:
        return f"{error.filename or 'the disk'}: {error.strerror}"
    return ""


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(staging: Path, place: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest, flush the folders, and move the whole into its place."""
    for path in sorted(
        staging.rglob("*")
    ):  # what no writer knows of: the tokenizer, DeepSpeed's copies of NVMe's files
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name not in manifest["files"]:
            flush_file(path)
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_whole(staging / MANIFEST, json.dumps(manifest | {"sha256": _hash_of(manifest)}, indent=1) + "\n")
    for each in sorted(path for path in staging.rglob("*") if path.is_dir()):
        flush_folder(each)
    if place.exists():  # of this step too, and not whole, or from before the run was taken back
        remove_folder(place)
    os.replace(staging, place)
    flush_folder(place.parent)


def prune(folder: Path, keep: int) -> int:
    """Remove all but the newest ``keep`` checkpoints of an output folder; how many those were."""
    older = listed(folder)[keep:]
    for each in older:
        remove_folder(each.folder)
    return len(older)


def remove_unfinished(folder: Path) -> list[str]:
    """Remove what a process left that was ended while it wrote or removed a checkpoint; the names of those."""
    place = folder / FOLDER
    left = [name for name in os.listdir(place) if PARTIAL.fullmatch(name)] if place.is_dir() else []
    for name in left:
        path = place / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return left


def size_of(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
