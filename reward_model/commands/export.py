# SPDX-License-Identifier: Apache-2.0
"""``reward-model export``: a model of a checkpoint, as the run that wrote it would have saved it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.common.logging import logger, show_messages
from reward_model.config.options import read_run
from reward_model.config.parser import build_parser
from reward_model.data.comparisons import Comparison
from reward_model.data.encoding import Encoding
from reward_model.data.tokenizer import SpecialTokens
from reward_model.evaluation.score_scale import keep_thresholds
from reward_model.models import saving
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, load_for_training
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer, resize_embedding
from reward_model.objectives.losses import Thresholds
from reward_model.training import verify
from reward_model.training.best import read_weights
from reward_model.training.checkpoint import BEST, TOKENIZER, Checkpoint, listed
from reward_model.training.model_card import Trained, card_of, write_card
from reward_model.training.whole_state import WholeState, fill


def main(arguments: list[str]) -> int:
    """Write the model of a checkpoint into a new folder, and see to it that it loads and scores as it did.

    Raises:
        UserError: no whole checkpoint there, a folder that is in use, or a base model that is not where it was.
    """
    parser = build_parser([], prog="reward-model export", description=__doc__.split("``: ")[1])
    _add_flags(parser)
    options = parser.parse_args(arguments)
    show_messages()
    found = first_whole(Path(options.checkpoint))
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is in use: name a new folder")
    run, state = read_run(found.folder / "run.json"), found.state()
    best = found.folder / BEST if options.best else None
    if best and not best.is_file():
        raise UserError(f"--best: {found.folder} has no best weights, as a run with --keep_best writes them")
    scorer = build(run, state, found, best)
    write(scorer, run, state, found, out, options.save_format, best is not None)
    step = state["best"]["step"] if best else found.step
    logger.info(f"the model of step {step} of {run['model_name_or_path']}: {out}")
    return 0


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="A checkpoint, or an output folder, of which the newest whole one is taken.")
    parser.add_argument("out", help="The folder to write, which is new or empty.")
    parser.add_argument("--best", action="store_true", help="Take the weights of the best evaluation (--keep_best).")
    parser.add_argument(
        "--save_format", choices=("hf", "dschat", "both"), default="hf", help="As main.py's flag of this name."
    )


def first_whole(path: Path) -> Checkpoint:
    """The checkpoint at a path, or the newest whole one of an output folder.

    Raises:
        UserError: there is none; says why the newest one is not whole.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    candidates = listed(path) or [Checkpoint(path)]
    faults = []
    for each in candidates:
        fault = each.fault()
        if not fault:
            return each
        faults.append(f"{each.folder}: {fault}")
        if len(candidates) > 1:
            logger.warning(f"{faults[-1]}; left out")
    raise UserError(f"no whole checkpoint: {faults[0]}")


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
    )
    resize_embedding(scorer, run["special"]["rows"])
    if run["lora_dim"]:
        add_lora(scorer, run["lora_dim"], run["lora_alpha"] or run["lora_dim"], run["lora_module_name"])
    if state["thresholds"]:
        scorer.thresholds = Thresholds(torch.arange(float(state["thresholds"])), dtype)
    for part in (scorer.config, scorer.config.get_text_config()):
        part.pad_token_id = run["special"]["pad"]
    saving.forget_scale(scorer.config)
    if best:
        read_weights(scorer, best)
    else:
        fill(scorer, WholeState(checkpoint))
    keep_thresholds(scorer, state["lowest_grade"])
    return scorer


def write(
    scorer: Scorer,
    run: dict[str, Any],
    state: dict[str, Any],
    checkpoint: Checkpoint,
    out: Path,
    save_format: str,
    is_best: bool,
) -> None:
    """Save a model with its card, and compare what is loaded from the folder with it.

    Raises:
        UserError: it cannot be saved so, or does not score as before.
    """
    trust = run["trust_remote_code"]
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        checkpoint.folder / TOKENIZER, trust_remote_code=trust
    )
    values = run["special"]
    endings, starts = frozenset(values["endings"]), frozenset(values["starts"])
    special = SpecialTokens(values["end"], values["pad"], endings, starts, values["rows"])
    forward = ForwardPass(scorer, scorer, DTYPES[run["dtype"]], torch.device("cpu"), special.pad)
    scorer.read_with(Encoding(tokenizer, special, run.get("pair_encoding", False)))
    counts = state.get("probe_second") or [0] * len(state["probe"])
    texts = [Comparison.of_ids(ids, second) for ids, second in zip(state["probe"], counts)]
    expected = verify.expect(forward, texts, tokenizer, special)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from error
    names = saving.save(scorer, tokenizer, out, save_format)
    forms = ("hf", "dschat") if save_format == "both" else (save_format,)
    if problem := verify.check(out, forms, expected, tokenizer, special, trust):
        raise UserError(f"what was saved lies in {verify.set_aside(out, names)}, and scores otherwise: {problem}")
    scale = {name: getattr(scorer.config, name) for name in saving.SCALE if hasattr(scorer.config, name)}
    sets, step, evaluated = state["metrics"], checkpoint.step, state["evaluated"]
    if is_best:  # of which the state keeps one number
        best = state["best"]
        sets, step, evaluated = {next(iter(sets)): {best["by"]: best["value"]}}, best["step"], best["step"]
    trained = Trained(run, sets, step, evaluated, state["health"], scale)
    write_card(out, card_of(out.resolve().name, names, tokenizer, trained))
