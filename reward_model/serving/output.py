# SPDX-License-Identifier: Apache-2.0
"""The file that scores are written to, and how it is gone on with after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from reward_model.common.errors import UserError, printable
from reward_model.common.files import sha256_of, write_whole
from reward_model.common.logging import logger
from reward_model.config.scoring import ScoreConfig
from reward_model.inference import RewardScorer
from reward_model.serving.inputs import Stdin

SIDECAR = ".resume.json"
OF_A_FLAG = ("lines", "columns", "best", "chat_template", "dtype")  # that change what is written
SAMPLE = 4_096  # numbers of each weight, evenly spread: another training moves them all
ERROR = re.compile(rb'\{"row": \d+, "error": ')
NUMBER = re.compile(rb'\{"row": (\d+)[,}]')


class Begun(NamedTuple):
    """An output file, open at its end, and what is in it: so many lines, and so many of these are errors."""

    file: BinaryIO
    lines: int
    errors: int


def line_of(outcome: dict) -> bytes:
    """As it is written: JSON on one line, in UTF-8."""
    text = json.dumps(outcome, ensure_ascii=False, allow_nan=False, default=str)  # Parquet's dates in a tool call
    return (text + "\n").encode("utf-8", "backslashreplace")


def identity(reward: RewardScorer, chat: bool, longest: int, config: ScoreConfig, given: str | Stdin) -> dict[str, Any]:
    """What must be the same for two runs to write the same lines."""
    flags = {name: getattr(config, name) for name in OF_A_FLAG}
    return {
        "model": fingerprint(reward),
        "input": given.identity() if isinstance(given, Stdin) else _file(Path(given)),
        "flags": flags | {"chat": chat, "max_seq_len": longest},
    }


def _file(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def fingerprint(reward: RewardScorer) -> str:
    """A hash of the config that scores go by, the tokenizer, and of up to ``SAMPLE`` numbers of each weight."""
    backend = getattr(reward.tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(reward.tokenizer.get_vocab().items()))
    said = [vocabulary, str(reward.tokenizer.chat_template), reward.mean, reward.temperature, reward.pad]
    said += [reward.beta] if reward.scorer.heads > 1 else []
    if reward.novelty is not None:  # the quantiles tell one fit from another
        said += [reward.novelty.about, reward.novelty.threshold, reward.novelty.quantiles.tolist()]
    digest = hashlib.sha256(json.dumps(said).encode())
    for name, weight in sorted(reward.scorer.state_dict().items()):
        values = weight.detach().flatten()
        values = values[:: max(1, -(-len(values) // SAMPLE))].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_free(path: Path, resume: bool) -> None:
    """Raises UserError: a file that is there and is not to be gone on with, or that nothing is known of.

    What can be told before a model is loaded.
    """
    beside = path.with_name(path.name + SIDECAR)
    try:
        if not path.exists() or (resume and not path.stat().st_size):
            return
        if not resume:
            raise UserError(f"--output {path} is there: --resume goes on with it, another name begins anew")
        if not beside.is_file():
            raise UserError(f"--resume: {beside} is missing, so that nobody knows what {path} was made of")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error


def begin(path: Path, resume: bool, wanted: dict[str, Any]) -> Begun:
    """Open an output file, anew or behind its last whole line.

    Raises:
        UserError: it is there and ``resume`` is not given, it was begun with another model, input or flags, or it
            cannot be written.
    """
    beside = path.with_name(path.name + SIDECAR)
    try:
        require_free(path, resume)
        if not path.exists() or not path.stat().st_size:
            write_whole(beside, json.dumps(wanted, indent=1) + "\n")
            return Begun(path.open("wb"), 0, 0)
        require_same(path, json.loads(beside.read_text(encoding="utf-8")), wanted)
        return _behind_the_last_line(path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--resume: {beside} is not JSON") from error


def require_same(path: Path, had: dict, wanted: dict) -> None:
    """Raises UserError: what is there was begun with other models, input or flags; says which."""
    for part in wanted:
        before, now = had.get(part), wanted[part]
        if before == now:
            continue
        whole = part == "input" and "first line" not in now  # of files, where each name would say no more
        if whole or not isinstance(now, dict) or not isinstance(before, dict):
            raise UserError(f"--resume: {path} was begun with another {part}")
        names = [name for name in now if before.get(name) != now[name]] or list(before.keys() - now.keys())
        each = ", ".join(f"{name} {_short(before.get(name))}, now {_short(now.get(name))}" for name in names)
        raise UserError(f"--resume: {path} was begun with other {part}: {each}")
    if "first line" in wanted["input"]:
        logger.warning("--resume: of standard input only the first line is compared with that of the first run")


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 40 else text[:12] + "…"


def _behind_the_last_line(path: Path) -> Begun:
    """Count what is there; what follows the last line break is cut off, as it is half a line."""
    lines = errors = end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if not NUMBER.match(line):
                raise UserError(f"--resume: line {lines + 1} of {path} is none that this command writes")
            lines, end = lines + 1, end + len(line)
            errors += bool(ERROR.match(line))
    os.truncate(path, end)
    return Begun(path.open("ab"), lines, errors)
