# SPDX-License-Identifier: Apache-2.0
"""Whether a run that lies in a folder is this one, and where it goes on.

Runs are compared by their ``run.json``: flags, DeepSpeed's configuration, the content of data and model, versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.config.groups import DataConfig, OutputConfig
from reward_model.config.options import read_run
from reward_model.config.settings import Settings
from reward_model.data.comparisons import Comparisons
from reward_model.training.checkpoint import Checkpoint, newest_whole
from reward_model.training.trackers import SECTIONS

FINISHED, INTERRUPTED = "finished.json", "interrupted.json"  # marks beside the model
# that change no number of a run, or that a run may be given more of
FREE = {each.name for each in fields(OutputConfig)} | {
    "num_train_epochs", "max_steps", "early_stop", "num_proc", "data_output_path", "deepspeed", "deepspeed_config",
    "local_rank", "nvme_path", "compute_fp32_loss", "only_optimize_lora", "num_padding_at_beginning",
    "trust_remote_code", "hang_timeout", "max_bad_steps", "score_limit",
}  # fmt: skip
BY_CONTENT = {each.name for each in fields(DataConfig)} - {"pair_encoding"} | {"model_name_or_path", "prior_model"}
BEFORE = {"pair_encoding": False}  # what runs did whose run.json does not say it
BATCHES_OF_DEEPSPEED = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
BATCHES = {"per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"}
CONTENTS = {"train": "the training rows", "evaluation": "the held-out rows", "model": "the model"}
VERSIONS = ("reward_model", "torch", "deepspeed", "transformers", "peft", "bitsandbytes")
SHOWN = 1 << 20  # bytes at either end of a weight file by which it is known


@dataclass(frozen=True)
class Start:
    """How a run begins.

    checkpoint: to go on from; None: at the first step. state: of that checkpoint. finished: nothing is left to do; what
    the run came to. steps: that the run took to its end; None: it has not come to it.
    """

    checkpoint: Checkpoint | None = None
    steps: int | None = None
    state: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] | None = None


def hash_of_rows(rows: Comparisons) -> str:
    """Equal for rows of the same texts, judged alike and in the same order, wherever they lie.

    The texts go into it by the hashes that preprocessing keeps of them.
    """
    digest = hashlib.sha256()
    for name in sorted(rows.table.column_names):
        if name in ("prompt", "responses", "subset"):  # no number of a run depends on a row's subset
            continue
        if name in ("two_segments", "single"):  # another way of encoding makes other ids
            continue
        if name == "strength" and not len(rows.numbers(name)):  # as runs had it before there were strengths
            continue
        digest.update(name.encode())
        for part in _bytes_of(rows, name):
            digest.update(part)
    return digest.hexdigest()


def hash_of_sets(sets: dict[str, Comparisons]) -> str:
    """Equal for evaluation sets of the same rows, names and order; of one set without a name, its rows' hash."""
    if list(sets) == [""]:
        return hash_of_rows(sets[""])
    return hashlib.sha256(json.dumps([[name, hash_of_rows(rows)] for name, rows in sets.items()]).encode()).hexdigest()


def _bytes_of(rows: Comparisons, name: str) -> list[bytes]:
    """A column's numbers, and where each row's begin."""
    values = rows._arrow(name)
    parts = []
    if hasattr(values, "value_lengths"):
        parts.append(np.asarray(values.value_lengths().fill_null(-1), dtype=np.int64).tobytes())
        values = values.flatten()
    return [*parts, repr(values.to_pylist()).encode() if values.null_count else np.asarray(values).tobytes()]


def hash_of_model(name_or_path: str) -> str:
    """Of its configuration, and the size, beginning and end of each weight file; empty: it is not on this disk."""
    folder = _folder_of(name_or_path)
    if folder is None:
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "config.json" and path.suffix not in (".safetensors", ".bin"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SHOWN))
            file.seek(max(0, size - SHOWN))
            digest.update(file.read(SHOWN))
    return digest.hexdigest()


def _folder_of(name_or_path: str) -> Path | None:
    """Where a model lies on this disk, in a folder or in the hub's cache."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name_or_path, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def described(settings: Settings, world_size: int, versions: dict[str, str], content: dict[str, str]) -> str:
    """``run.json``."""
    ours = {"steps_per_print", "train_batch_size"} | BATCHES_OF_DEEPSPEED | set(SECTIONS)
    deepspeed = {key: value for key, value in settings.deepspeed.config.items() if key not in ours}
    return settings.to_json(versions, content=content, world_size=world_size, deepspeed_json=deepspeed)


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What of a run is otherwise than in another, by name.

    >>> differences({"seed": 1, "world_size": 2}, {"seed": 2, "world_size": 2})
    ['--seed (1 there, 2 here)']
    """
    there, here = BEFORE | there, BEFORE | here
    same_ranks = there.get("world_size") == here.get("world_size")
    skipped = FREE | BY_CONTENT | {"given", "versions", "content", "world_size", "deepspeed_json", "special", "data"}
    skipped |= set() if same_ranks else BATCHES
    found = [
        f"--{name} ({there.get(name)} there, {here.get(name)} here)"
        for name in sorted(set(there) | set(here))
        if name not in skipped and there.get(name) != here.get(name)
    ]
    if not same_ranks and _global_batch(there) != _global_batch(here):
        found.append(f"the global batch ({_global_batch(there)} there, {_global_batch(here)} here)")
    if not found and same_ranks and _elsewhere(there.get("deepspeed_json")) != _elsewhere(here.get("deepspeed_json")):
        found.append("DeepSpeed's configuration")
    found += _other_content(there, here)
    for name in VERSIONS:
        one, other = (each.get("versions", {}).get(name) for each in (there, here))
        if one != other:
            found.append(f"{name} ({one} there, {other} here)")
    return found


def _global_batch(run: dict[str, Any]) -> int | None:
    """Of a step, over all processes."""
    try:
        size = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"] * run["world_size"]
        return size // run["sequence_parallel_size"]
    except (KeyError, TypeError):
        return None


def _elsewhere(values: Any) -> Any:
    """DeepSpeed's configuration without the folders on NVMe, of which each start has its own."""
    if not isinstance(values, dict):
        return values
    return {name: _elsewhere(value) for name, value in values.items() if name != "nvme_path"}


def _other_content(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Data and model that are not the same, and the flags that may be why."""
    found = []
    for key, what in CONTENTS.items():
        if there.get("content", {}).get(key) == here.get("content", {}).get(key):
            continue
        names = ["model_name_or_path"] if key == "model" else [each.name for each in fields(DataConfig)]
        changed = [f"--{name}" for name in names if there.get(name) != here.get(name) and name not in FREE]
        found.append(f"{what} (by content{'; ' + ', '.join(changed) + ' changed' if changed else ''})")
    return found


def choose_start(output: OutputConfig, here: dict[str, Any], context: DistributedContext) -> Start:
    """Where this run begins; every rank calls it.

    Args:
        here: this run, as its ``run.json`` will say.

    Raises:
        UserError: another run lies there, or the checkpoint that was named cannot be gone on from.
    """
    folder = Path(output.output_dir or "")
    mark: dict[str, Any] | None = None
    said: list[str] = []
    wanted = output.resume not in ("auto", "none")
    if wanted:
        checkpoint: Checkpoint | None = _named(Path(output.resume), context)
    else:
        there, mark = distributed.from_first((read_run(folder / "run.json"), _mark_of(folder)))
        if output.resume == "none" or not there:
            return Start()
        what = f"--output_dir {folder} holds another run"
        said = _require_same(there, here, output.resume_anyway, what, "name a new folder")
        is_same = not said and all(there.get(name) == here.get(name) for name in ("num_train_epochs", "max_steps"))
        if mark is not None and is_same:
            return Start(finished=mark)
        checkpoint = newest_whole(folder, context)
        if checkpoint is None and mark is not None:
            raise UserError(
                f"--output_dir {folder}: that run is finished and has no whole checkpoint: name a new folder"
            )
    if checkpoint is None:
        logger.warning(f"{folder} holds this run without a whole checkpoint: it begins again")
        return Start()
    there = read_run(checkpoint.folder / "run.json")
    _require_same(there, here, output.resume_anyway, f"{checkpoint.folder} is of another run", "mend the command", said)
    return Start(checkpoint, mark["step"] if mark else None, checkpoint.state())


def _require_same(
    there: dict[str, Any], here: dict[str, Any], anyway: bool, what: str, advice: str, said: Sequence[str] = ()
) -> list[str]:
    """What differs between a run and this one; it is said, unless it was.

    Raises:
        UserError: something does, and the run shall not go on all the same.
    """
    found = differences(there, here)
    if found and not anyway:
        raise UserError(f"{what}: {'; '.join(found)}. {advice.capitalize()}, or add --resume_anyway")
    if found and found != said:
        logger.warning(f"going on although there are differences: {'; '.join(found)}")
    return found


def _mark_of(folder: Path) -> dict[str, Any] | None:
    """What a finished run came to; None: it is not finished."""
    try:
        found = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _named(path: Path, context: DistributedContext) -> Checkpoint:
    """The checkpoint that ``--resume`` names, or the newest whole one of the output folder that it names."""
    if (path / "checkpoints").is_dir():
        found = newest_whole(path, context)
        if found is None:
            raise UserError(f"--resume {path}: no whole checkpoint there")
        return found
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such folder")
    checkpoint = Checkpoint(path)
    if fault := distributed.first_text(checkpoint.fault(context.rank, context.world_size)):
        raise UserError(f"--resume {path}: {fault}")
    return checkpoint
