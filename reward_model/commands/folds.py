# SPDX-License-Identifier: Apache-2.0
"""``reward-model ensemble --folds``: pairs judged by models that have not seen them.

The prompts are dealt out to K parts of about the same number of rows. For each part a model is trained on the rows of
all others, in a process of its own, and judges this part alone (cross-fitting). With repeats there are several splits,
so that each pair is judged by several models, and has a standard deviation.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from reward_model.common.distributed import join, prepare_environment
from reward_model.common.errors import Ended, UserError
from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.config.ensemble import EnsembleConfig
from reward_model.config.options import RunConfig, parse
from reward_model.data.chat_template import give_template
from reward_model.data.tokenizer import load_tokenizer
from reward_model.data.training_rows import TrainingRows
from reward_model.serving.ensemble import Judge, identity_of, judge_with, line_of_row, output_of, require_free, rows_of
from reward_model.serving.inputs import row_of
from reward_model.serving.output import require_same

WORK = ".folds"  # of the folder beside the output
PLAN = "folds.json"
TRAIN, HELD_OUT, MODEL = "train.jsonl", "held_out.jsonl", "model"
FINISHED = "finished.json"  # which a run writes beside its model
ENDED = (os.EX_TEMPFAIL, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
EVALUATED = 2_000  # rows of its own part on which the training of a model is evaluated
OURS = (
    "data_path",
    "split",
    "output_dir",
    "resume",
    "seed",
    "columns",
    "push_to_hub",
)  # that are not for the training's flags


def cross_fit(config: EnsembleConfig, words: list[str]) -> dict[str, Any]:
    """Train the models of all folds, and let each judge the rows that it has not seen.

    Args:
        words: flags of the training, without data and output.

    Returns:
        What :func:`reward_model.serving.ensemble.ensemble` returns.

    Raises:
        UserError: flags or data that cannot be used, or a training that failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--folds starts the processes of its trainings: start it once, with --processes N")
    output = output_of(config)
    training = training_of(words)
    require_free(config)
    if config.repeats == 1 and training.model.heads == 1:
        logger.warning("one model judges each pair: strength_std is 0, and strength_agree 0 or 1; --repeats makes more")
    rows = rows_of(config, training.data.chat)
    work = output.with_name(output.name + WORK)
    if work.exists() and any(work.iterdir()) and not config.resume:
        raise UserError(f"{work} is left of a run that did not end: --resume goes on with it, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    wanted = {
        "input": identity_of(rows),
        "flags": {name: getattr(config, name) for name in ("folds", "repeats", "processes", "seed", "columns")}
        | {"training": " ".join(words)},
    }
    if (work / PLAN).exists():
        require_same(work, json.loads((work / PLAN).read_text(encoding="utf-8")), wanted)
    hashes = prompts_of(rows, training)
    folds = np.stack([deal(hashes, config.folds, config.seed + repeat) for repeat in range(config.repeats)])
    write_whole(work / PLAN, json.dumps(wanted, indent=1) + "\n")
    judges = []
    for repeat, of_rows in enumerate(folds):
        places = [work / f"repeat-{repeat}" / f"fold-{fold:03}" for fold in range(config.folds)]
        if not all((place / MODEL / FINISHED).exists() for place in places):
            write_folds(rows, of_rows, places)
        for fold, place in enumerate(places):
            mine = of_rows == fold
            said = f"repeat {repeat + 1}, fold {fold + 1} of {config.folds}: a model of {int((~mine).sum())} rows"
            logger.info(f"{said} for {int(mine.sum())} others")
            if not (place / MODEL / FINISHED).exists():
                train(place, config, training, words, repeat)
            judges.append(Judge(str(place / MODEL), mine))
    prepare_environment()
    summary = judge_with(judges, config, join())
    logger.info(f"the models of the folds stay in {work}: remove it when they are of no more use")
    return summary


def training_of(words: list[str]) -> RunConfig:
    """The flags of the training. Raises UserError: one that is not for them, or one that lets a model see its rows."""
    training = parse(words)
    for name in OURS:
        if name in training.given:
            before = {"seed": "--seed before -- is that of the parts, and of the trainings"}
            before |= {name: f"--{name} before -- is that of the rows" for name in ("split", "columns")}
            instead = before.get(name, "leave it out")
            raise UserError(f"--{name} after --: the folds have their own; {instead}")
    chosen = [name for name in ("keep_best", "early_stop") if getattr(training.evaluation, name)]
    if chosen and not training.data.eval_data_path:
        raise UserError(
            f"--{chosen[0]} without --eval_data_path: the rows that a model is to judge would choose its weights"
        )
    return training


def prompts_of(rows: TrainingRows, training: RunConfig) -> np.ndarray:
    """A hash of each row's prompt as the training reads it, int64 (n,); of a row that cannot be read, of its number.

    Raises:
        UserError: no tokenizer or chat template.
    """
    model, data = training.model, training.data
    tokenizer = load_tokenizer(model.model_name_or_path, data.add_eot_token, model.trust_remote_code)
    if data.chat_template:
        give_template(tokenizer, data.chat_template)
    hashes, unknown = array("q"), 0
    for at, (source, number, row) in enumerate(rows):
        texts = row_of(number, row, source, data.chat, tokenizer).texts
        if not isinstance(texts, str):
            unknown += not texts.has_prompt
        prompt = f"\0{at}" if isinstance(texts, str) else " ".join(texts.prompt.split())
        digest = hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "big", signed=True))
    if unknown:
        logger.warning(
            f"{counted(unknown, 'row')} do not say where their prompt ends: it is taken for what both answers begin "
            "with, and rows that were asked the same may come into different folds"
        )
    return np.array(hashes, np.int64)


def deal(hashes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Which part each row is in, int32 (n,): rows of one prompt in one part, and parts of about the same size.

    It follows from the prompts and the seed, not from the order of the rows: prompts are sorted by how many rows they
    have and then by a hash of prompt and seed, and each goes to the part that has the fewest rows.

    Args:
        hashes: of each row's prompt, (n,).

    Raises:
        UserError: fewer prompts than parts.
    """
    prompts, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    if len(prompts) < folds:
        raise UserError(f"--folds {folds}: the rows have {counted(len(prompts), 'prompt')}, and each stays in one part")
    key = str(seed).encode()
    drawn = [hashlib.blake2b(int(each).to_bytes(8, "big", signed=True), digest_size=8, key=key).digest()
             for each in prompts]  # fmt: skip
    sizes = np.zeros(folds, np.int64)
    parts = np.zeros(len(prompts), np.int32)
    for prompt in sorted(range(len(prompts)), key=lambda i: (-counts[i], drawn[i])):
        parts[prompt] = sizes.argmin()
        sizes[parts[prompt]] += counts[prompt]
    return parts[inverse]


def write_folds(rows: TrainingRows, of_rows: np.ndarray, places: list[Path]) -> None:
    """Write of each fold the rows that its model learns from, and those that it will judge."""
    with ExitStack() as stack:
        files: list[tuple[BinaryIO, BinaryIO]] = []
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            one, other = (stack.enter_context((place / f".{name}").open("wb")) for name in (TRAIN, HELD_OUT))
            files.append((one, other))
        unreadable = 0
        for fold, stored in zip(of_rows, rows):
            row = stored.columns()
            if row is None:
                unreadable += 1
                continue
            line = line_of_row(row)
            for number, (learned, judged) in enumerate(files):
                (judged if number == fold else learned).write(line)
    for place in places:
        for name in (TRAIN, HELD_OUT):
            os.replace(place / f".{name}", place / name)
    if unreadable:
        logger.warning(f"{counted(unreadable, 'row')} could not be read, and are in no fold")


def train(place: Path, config: EnsembleConfig, training: RunConfig, words: list[str], repeat: int) -> None:
    """Train the model of a fold in a process of its own, which gives its memory back; one that is there goes on.

    Raises:
        UserError: it failed, or was asked to end.
    """
    start = [sys.executable, "-m"]
    if config.processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(config.processes), "-m"]
    flags = [*words, "--data_path", str(place / TRAIN), "--output_dir", str(place / MODEL)]
    flags += ["--seed", str(config.seed + repeat)]
    flags += ["--columns", *config.columns] if config.columns else []
    if not training.data.eval_data_path:
        flags += ["--eval_data_path", str(place / HELD_OUT)]
        if "max_eval_samples" not in training.given:
            flags += ["--max_eval_samples", str(EVALUATED)]
    outside = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with (
        subprocess.Popen(
            [*start, "reward_model", "train", *flags], env=outside, stdout=subprocess.PIPE, text=True, errors="replace"
        ) as process,
        passed_on(process),
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
        status = process.wait()
    if status in ENDED:
        raise Ended(f"{place / MODEL}: the training was asked to end; the same command with --resume goes on")
    if status:
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        raise UserError(f"{place / MODEL}: the training ended {how}; see above, and --resume goes on")


@contextmanager
def passed_on(process: subprocess.Popen) -> Iterator[None]:
    """Requests to end go to a process that is waited for, which then saves its work."""

    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(signal.SIGTERM)

    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
