# SPDX-License-Identifier: Apache-2.0
"""``reward-model check``: whether main.py would take some flags, by what a short look shows."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from reward_model.common.errors import UserError
from reward_model.common.logging import logger, show_messages
from reward_model.config.loss import resolve_loss
from reward_model.config.options import (
    RunConfig,
    expand,
    parse,
    require_data,
    require_model_folder,
    require_usable_folder,
)

FIRST_ROWS = 100


def main(arguments: list[str]) -> int:
    """Look at main.py's flags as a launcher does before it starts any process: values, folders, and rows of the data.

    With ``--expand`` before them it prints them instead, what ``--config`` names in its place, as a line for a shell.

    Raises:
        UserError: a wrong flag, an output folder that holds another run, a model that is a path and not there or that
            lacks what a term of the loss needs, or data that cannot be read.
    """
    if arguments[:1] == ["--expand"]:
        print(shlex.join(expand(arguments[1:])))
        return 0
    config = parse(arguments)
    require_data(config)
    require_usable_folder(config.output)
    require_model_folder(config.model.model_name_or_path, config.model.trust_remote_code)
    _check_terms(config)
    _check_deepspeed(config)
    show_messages()
    if unseen := check_data(config):
        logger.info(f"not looked at: {', '.join(unseen)}, which would have to come from the hub")
    print("nothing found that would stop the run")
    return 0


def _check_terms(config: RunConfig) -> None:
    """Whether a model that lies in a folder has what the loss takes from it; an adapter is merged by the run alone."""
    loss, model = resolve_loss(config.loss, config.given), config.model
    is_there = (Path(model.model_name_or_path) / "config.json").is_file()
    if not is_there or not (loss.contrastive_weight or loss.sft_weight):
        return
    from reward_model.models.loading import read_config
    from reward_model.models.term_needs import require_what_terms_need

    require_what_terms_need(loss, model, read_config(model.model_name_or_path, model.trust_remote_code))


def _check_deepspeed(config: RunConfig) -> None:
    """Have DeepSpeed read the file of --deepspeed_config, unless its batch size asks how many processes there are."""
    if not config.engine.deepspeed_config:
        return
    from reward_model.config.deepspeed import read_file, set_up_deepspeed

    if read_file(config.engine).get("train_batch_size", "auto") == "auto":
        set_up_deepspeed(config, "fp32", world_size=1, hidden_size=1024)


def check_data(config: RunConfig) -> list[str]:
    """Read the first rows of every local file and saved data set that a run would read.

    Returns:
        The entries that are names of the hub, at which nothing is looked.

    Raises:
        UserError: what training would say of them.
    """
    data = config.data
    held_out = [path for paths in data.eval_sets.values() for path in paths]
    of_kinds = {"training": data.data_path, "held out": held_out, "shifted": data.meta_data}
    entries = [(entry, kind) for kind, paths in of_kinds.items() for entry in paths]
    unseen = [entry for entry, _ in entries if _is_name(entry)]
    if len(unseen) == len(entries):
        return unseen
    from reward_model.data.preprocessing import nothing_judged, nothing_to_tell_apart
    from reward_model.data.sources import Splits, amount_of, read_sources
    from reward_model.objectives.objective import Objective, missing_by

    loss_missing = missing_by(Objective(resolve_loss(config.loss, config.given)), config.data)
    tokenizer = _tokenizer(config)
    pairs = _reads_pairs(config, tokenizer)
    for entry, kind in entries:
        if entry in unseen:
            continue
        path, _ = amount_of(entry)
        splits = Splits(data.split if kind == "training" else None, data.eval_split)
        train, evaluation = read_sources(
            path, 0, names=data.names, splits=splits, chat=data.chat, hold_out=False, first=FIRST_ROWS
        )
        if kind != "training":
            train, evaluation = [], evaluation or train
        of_others = nothing_to_tell_apart if kind == "shifted" else nothing_judged
        for sources, missing in ((train, loss_missing), (evaluation, of_others)):
            for source in sources:
                _check_rows(source, tokenizer, missing, config, pairs)
    return unseen


def _is_name(entry: str) -> bool:
    """Whether an entry can only be a name of the hub."""
    path = entry.rpartition(":")[0] or entry
    is_path = path.startswith((".", "/", "~")) or Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet", ".gz")
    return not is_path and not os.path.exists(path) and not os.path.exists(entry) and path != "local/jsonfile"


def _check_rows(source, tokenizer, missing, config: RunConfig, pairs: bool) -> None:
    from reward_model.data.comparisons import Comparison
    from reward_model.data.preprocessing import is_glued, is_plain, joined_as_they_are, read_text, reason_of

    plain = glued = 0
    problems: dict[int, str] = {}
    rows = source.rows.select(range(min(FIRST_ROWS, len(source.rows))))
    for number, row in source.stored(FIRST_ROWS):
        text = read_text(source, row, tokenizer, config.data.chat)
        problem = text if isinstance(text, str) else reason_of(missing, Comparison([], [], **text.judged))
        problems |= {number: problem} if problem else {}
        if not isinstance(text, str) and not isinstance(tokenizer, AnyTokenizer) and not pairs:
            plain, glued = plain + is_plain(text, tokenizer), glued + is_glued(text)
    stops = config.data.on_bad_row == "stop" or len(problems) == len(rows)
    if problems and stops:
        number, problem = next(iter(problems.items()))
        count = f"{len(problems)} of the first {len(rows)} rows cannot be used"
        count += "; --on_bad_row skip leaves them out" if len(problems) < len(rows) else ""
        raise UserError(f"{source.name}, row {number}: {problem} ({count})")
    for line in joined_as_they_are(plain, glued, len(rows), bool(tokenizer.chat_template)):
        logger.warning(f"{source.name}: {line}")


def _reads_pairs(config: RunConfig, tokenizer) -> bool:
    """Whether the model reads pairs, where it lies in a folder; then nothing is doubtful about how texts are joined."""
    model = config.model
    if isinstance(tokenizer, AnyTokenizer) or not (Path(model.model_name_or_path) / "config.json").is_file():
        return bool(config.data.pair_encoding)
    from reward_model.models.loading import is_reward_model, read_config
    from reward_model.models.pair_encoding import for_training

    name, trust = model.model_name_or_path, model.trust_remote_code
    found = read_config(name, trust)
    is_trained = is_reward_model(name, found) and not model.new_head
    return for_training(
        config.data.pair_encoding, name, found, tokenizer, config.data.chat, is_trained, model.pooling, trust
    )


def _tokenizer(config: RunConfig):
    """The model's own, where it lies in a folder; else one whose template writes any chat."""
    from reward_model.data.chat_template import give_template
    from reward_model.data.tokenizer import load_tokenizer

    if not Path(config.model.model_name_or_path).is_dir():
        return AnyTokenizer()
    tokenizer = load_tokenizer(config.model.model_name_or_path, trust_remote_code=config.model.trust_remote_code)
    if config.data.chat_template:
        give_template(tokenizer, config.data.chat_template)
    return tokenizer


class AnyTokenizer:
    """Stands in for one that is not here."""

    chat_template = "?"

    def apply_chat_template(self, messages: list[dict], **options) -> str:
        return "".join(f"{message['role']}: {message['content']}" for message in messages)
