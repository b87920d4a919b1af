# SPDX-License-Identifier: Apache-2.0
"""A model, an adapter or a checkpoint, written in a form that another program reads."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.common.files import remove_folder
from reward_model.common.logging import logger
from reward_model.config.forms import Form
from reward_model.config.groups import DataConfig
from reward_model.config.options import read_run
from reward_model.data.comparisons import Comparison
from reward_model.data.encoding import Encoding
from reward_model.data.tokenizer import SpecialTokens
from reward_model.evaluation.score_scale import keep_thresholds
from reward_model.inference import load
from reward_model.models import adapters, saving
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.many_heads import FOLDER as HEADS
from reward_model.models.many_heads import tell_heads
from reward_model.models.scorer import Scorer, resize_embedding
from reward_model.objectives.losses import Thresholds
from reward_model.training import verify
from reward_model.training.best import read_weights
from reward_model.training.checkpoint import BEST, MANIFEST, TOKENIZER, Checkpoint, listed
from reward_model.training.model_card import Trained, card_of, write_card
from reward_model.training.naming import name_model
from reward_model.training.resume import FINISHED
from reward_model.training.texts import Text, made_up, scored_as
from reward_model.training.verification import Line, longest_of, verify_adapter
from reward_model.training.whole_state import WholeState, fill


@dataclass(frozen=True)
class Model:
    """What is exported.

    described: for people, in a line. texts: to compare scores by. trained: what the card tells; None: no run
    of ours is known, and there is no card.
    """

    described: str
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    dtype: torch.dtype
    texts: list[Comparison] = field(default_factory=list)
    trust_remote_code: bool = False
    trained: Trained | None = None


def export(
    folder: str | Path,
    out: str | Path,
    to: Form = "hf",
    *,
    adapter: bool = False,
    best: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Write a model into a new folder, and see to it that it loads and scores as it did; returns what it was, in words.

    folder: with a model, an adapter, or a checkpoint; of an output folder without a model the newest whole checkpoint.
    adapter: a LoRA adapter stays apart and is not merged. best: a checkpoint's best weights, those of ``--keep_best``.

    Raises:
        UserError: nothing there that can be exported, a form that the model has not, a folder that is in use, or a base
            model that is not where it was.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is in use: name a new folder")
    if adapter and to != "hf":
        raise UserError(f"--adapter --to {to}: PEFT alone loads an adapter beside its base; leave --to out")
    if is_saved(folder) and not best:
        if adapter:
            copy_adapter(folder, out, trust_remote_code)
            return f"the adapter of {folder}"
        model = saved_model(folder, trust_remote_code)
    else:
        model = model_of(first_whole(folder), best)
    write(model, out, to, adapter)
    return model.described


def is_saved(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, and is no checkpoint."""
    has_model = (folder / "config.json").is_file() and not (folder / MANIFEST).is_file()
    return has_model or adapters.is_adapter(str(folder))


def first_whole(path: Path) -> Checkpoint:
    """The checkpoint at a path, or the newest whole one of an output folder.

    Raises:
        UserError: there is none; says why the newest one is not whole.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    candidates = listed(path) or [Checkpoint(path)]
    if candidates[0].folder == path and not (path / MANIFEST).is_file():
        raise UserError(f"{path} holds no model (config.json) and no checkpoint")
    faults = []
    for each in candidates:
        fault = each.fault()
        if not fault:
            return each
        faults.append(f"{each.folder}: {fault}")
        if len(candidates) > 1:
            logger.warning(f"{faults[-1]}; left out")
    raise UserError(f"no whole checkpoint: {faults[0]}")


def saved_model(folder: Path, trust_remote_code: bool) -> Model:
    """A model that was saved, in whichever form, or an adapter merged into its base.

    Raises:
        UserError: it does not load.
    """
    reward = load(folder, trust_remote_code=trust_remote_code)
    chosen = made_up(reward.tokenizer, _longest(reward.scorer, reward.tokenizer))
    texts = [scored_as(text, reward.encoding) for text in chosen]
    return Model(
        f"the model in {folder}",
        reward.scorer,
        reward.tokenizer,
        reward.special,
        reward.forward.dtype,
        texts,
        trust_remote_code,
        _trained_before(folder, reward.scorer),
    )


def _longest(scorer: Scorer, tokenizer: PreTrainedTokenizerBase) -> int | None:
    return longest_of(scorer.config.get_text_config().to_dict(), tokenizer)


def _trained_before(folder: Path, scorer: Scorer) -> Trained | None:
    """What the run that left an output folder says of its model; None: there was no such run, or it did not end."""
    run, finished = read_run(folder / "run.json"), folder / FINISHED
    if not run or not finished.is_file():
        return None
    end = json.loads(finished.read_text(encoding="utf-8"))
    records = []
    if (folder / "metrics.jsonl").is_file():
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    health = {
        "alarms": [record for record in records if record.get("split") == "alarm" and "message" in record],
        "bad_steps": {"count": sum(record.get("split") == "bad_step" for record in records)},
    }
    return Trained(run, end.get("sets", {"": end["metrics"]}), end["step"], end["step"], health, *_told(scorer))


def _told(scorer: Scorer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``config.json`` says of the scores, and of the model."""
    config = scorer.config
    scale = {name: getattr(config, name) for name in saving.SCALE if hasattr(config, name)}
    return scale, getattr(config, saving.NAMING, {})


def model_of(checkpoint: Checkpoint, is_best: bool) -> Model:
    """The model of a checkpoint, as the run that wrote it would have saved it.

    Raises:
        UserError: no best weights there, or the base model is not where it was.
    """
    run, state = read_run(checkpoint.folder / "run.json"), checkpoint.state()
    best = checkpoint.folder / BEST if is_best else None
    if best and not best.is_file():
        raise UserError(f"--best: {checkpoint.folder} has no best weights, as a run with --keep_best writes them")
    scorer = build(run, state, checkpoint, best)
    trust = run["trust_remote_code"]
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        checkpoint.folder / TOKENIZER, trust_remote_code=trust
    )
    values = run["special"]
    endings, starts = frozenset(values["endings"]), frozenset(values["starts"])
    special = SpecialTokens(values["end"], values["pad"], endings, starts, values["rows"])
    scorer.read_with(Encoding(tokenizer, special, run.get("pair_encoding", False)))
    name_model(scorer, tokenizer, run)
    sets, step, evaluated = state["metrics"], checkpoint.step, state["evaluated"]
    if is_best:  # of which the state keeps one number
        found = state["best"]
        sets, step, evaluated = {next(iter(sets)): {found["by"]: found["value"]}}, found["step"], found["step"]
    trained = Trained(run, sets, step, evaluated, state["health"], *_told(scorer))
    described = f"the model of step {step} of {run['model_name_or_path']}"
    counts = state.get("probe_second") or [0] * len(state["probe"])
    texts = [Comparison.of_ids(ids, second) for ids, second in zip(state["probe"], counts)]
    return Model(described, scorer, tokenizer, special, DTYPES[run["dtype"]], texts, trust, trained)


def build(run: dict[str, Any], state: dict[str, Any], checkpoint: Checkpoint, best: Path | None) -> Scorer:
    """The model of a run, on the host, with the weights of a checkpoint.

    Args:
        run, state: what ``run.json`` and ``state.json`` of the checkpoint say.
        best: the file of the best weights; None: those of the checkpoint's step.
    """
    dtype = DTYPES[run["dtype"]]
    scorer = load_for_training(
        run["model_name_or_path"],
        dtype,
        run["seed"],
        run["pooling"],
        trust_remote_code=run["trust_remote_code"],
        new_head=run["new_head"],
        heads=run.get("heads", 1),
    )
    resize_embedding(scorer, run["special"]["rows"])
    if run["lora_dim"]:
        add_lora(scorer, run["lora_dim"], run["lora_alpha"] or run["lora_dim"], run["lora_module_name"])
    if state["thresholds"]:
        scorer.thresholds = Thresholds(torch.arange(float(state["thresholds"])), dtype)
    for part in (scorer.config, scorer.config.get_text_config()):
        part.pad_token_id = run["special"]["pad"]
    saving.forget_scale(scorer.config)
    tell_heads(scorer)
    if best:
        read_weights(scorer, best)
    else:
        fill(scorer, WholeState(checkpoint))
    keep_thresholds(scorer, state["lowest_grade"])
    return scorer


def write(model: Model, out: Path, to: Form, adapter: bool = False) -> None:
    """Save a model with its card, and compare what is loaded from the folder with it.

    Args:
        to: one of :data:`Form`.
        adapter: the adapter alone is kept; its base is where it was.

    Raises:
        UserError: it cannot be saved so, or does not score as before.
    """
    scorer, tokenizer = model.scorer, model.tokenizer
    if adapter and not hasattr(scorer.model, "peft_config"):
        raise UserError("--adapter: the model has none; leave the flag out")
    saving.require_form(scorer, tokenizer, to)
    forward = ForwardPass(scorer, scorer, model.dtype, torch.device("cpu"), model.special.pad)
    expected = verify.expect(forward, model.texts, tokenizer, model.special)
    make(out)
    names = saving.save(scorer, tokenizer, out, to)
    form = "dschat" if to == "dschat" else "hf"
    outcome = verify.check(out, (form,), expected, tokenizer, model.special, model.trust_remote_code)
    if outcome.differs:
        aside = verify.set_aside(out, names)
        raise UserError(f"what was saved lies in {aside}, and scores otherwise: {outcome.differs}")
    if adapter:
        keep_adapter(out, names, made_up(tokenizer, _longest(scorer, tokenizer)), model.trust_remote_code)
        return
    if model.trained is None:
        logger.info("no card is written: no run.json of a finished run tells of the model")
        return
    trained = replace(model.trained, not_verified=outcome.not_verified)
    write_card(out, card_of(out.resolve().name, names, tokenizer, trained))


def copy_adapter(folder: Path, out: Path, trust_remote_code: bool) -> None:
    """Copy an adapter, and see to it that it scores beside its base as the model that has it merged.

    Raises:
        UserError: there is none, or it scores otherwise.
    """
    place = folder if adapters.is_adapter(str(folder)) else folder / "adapter"
    if not adapters.is_adapter(str(place)):
        raise UserError(f"--adapter: {folder} has no adapter/; leave the flag out")
    whole = adapters.merged_before(str(place)) or adapters.merged(
        str(place), DataConfig().cache_folder, trust_remote_code
    )
    reward = load(whole, trust_remote_code=trust_remote_code)
    texts = made_up(reward.tokenizer, _longest(reward.scorer, reward.tokenizer))
    make(out)
    for path in place.iterdir():
        if path.is_file():
            shutil.copy2(path, out / path.name)
    if (place / HEADS).is_dir():
        shutil.copytree(place / HEADS, out / HEADS)
    _require_same(verify_adapter(Path(whole), out, texts, trust_remote_code), out)


def keep_adapter(out: Path, names: list[str], texts: list[Text], trust_remote_code: bool) -> None:
    """Leave of a saved model its adapter alone, once it scores beside its base as the merged model does.

    Args:
        names: of what was saved in the folder.

    Raises:
        UserError: it does not, or PEFT would put parts of it elsewhere.
    """
    if "adapter" not in names:
        raise UserError(f"--adapter: {out} has the merged model alone, for the reason above; leave the flag out")
    _require_same(verify_adapter(out, out / "adapter", texts, trust_remote_code), out)
    for name in names:
        if (out / name).is_file():
            (out / name).unlink()
        elif name != "adapter":
            remove_folder(out / name)
    for path in (out / "adapter").iterdir():
        shutil.move(path, out / path.name)
    (out / "adapter").rmdir()


def _require_same(line: Line, out: Path) -> None:
    if line.status == "differs":
        raise UserError(f"the adapter in {out} scores otherwise than the model that has it merged: {line.note}")
    logger.info(f"the adapter beside its base: {' '.join(str(line).split())}")


def make(out: Path) -> None:
    """Raises UserError: the folder cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from error
