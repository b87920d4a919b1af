# SPDX-License-Identifier: Apache-2.0
"""A run from flags to files: data, model, engine, training, and what is left behind."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, set_seed

import reward_model
from reward_model.batching.planner import Planner
from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import say
from reward_model.config.deepspeed import build_config
from reward_model.config.options import cache_folder, explain_inherited, refuse_used_folder
from reward_model.data.comparisons import Comparisons
from reward_model.data.preprocessing import PreprocessingConfig, load_answers, load_comparisons
from reward_model.data.tokenizer import SpecialTokens, choose_special_tokens, load_tokenizer
from reward_model.evaluation import pictures, score_scale
from reward_model.evaluation.evaluate import summary
from reward_model.models import saving
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, read_config
from reward_model.models.scorer import Scorer, count
from reward_model.models.shared_prefix import SEPARATE
from reward_model.objectives import answer_similarity
from reward_model.objectives.losses import Thresholds
from reward_model.objectives.objective import Objective
from reward_model.training.engine import build_scorer, partition_while_loading, start_engine
from reward_model.training.records import Records, write_text
from reward_model.training.trainer import Trainer

ROWS_TO_NORMALISE_BY = 4_096  # their standard deviation is known to about 1 %; OpenAI took 256


def run(options: argparse.Namespace) -> None:
    """Train, evaluate and save as the flags say.

    Raises:
        UserError: whatever the user can mend.
    """
    folder = Path(options.output_dir) if options.output_dir else None
    if folder:
        refuse_used_folder(folder)
    context = distributed.start(options)
    explain_inherited(options)
    options.dtype = options.dtype or distributed.default_dtype()
    distributed.require_dtype(options.dtype)
    set_seed(options.seed)
    config = read_config(options.model_name_or_path)
    text = config.get_text_config()
    ds_config = build_config(options, context.world_size, text.hidden_size, text.vocab_size)
    distributed.require_zero(ds_config["zero_optimization"], options.nvme_path)
    objective = Objective(options)
    data = load_data(options, text, objective, context)
    trainer = prepare(options, context, objective, data, ds_config, folder)
    trainer.train()
    keep_scale(trainer, data.reference)
    trainer.forward.use(SEPARATE)  # what is saved names no attention of ours
    trainer.engine.empty_partition_cache()  # ZeRO 3 may be fetching ahead, and gathers no weight twice
    if folder:
        scorer = trainer.forward.scorer
        saving.save(scorer, data.tokenizer, folder, options.save_format, is_writer=context.is_first)
        if context.is_first:
            pictures.draw(folder / "metrics.jsonl", folder / "report.png", trainer.last.scores)
    summarize(trainer, folder)
    torch.distributed.barrier()
    if options.nvme_path:
        distributed.release_swap_files(ds_config["zero_optimization"], options.nvme_path)


@dataclass(frozen=True)
class Data:
    """The rows of a run, tokenised.

    reference: those that scores are normalized by; None: they are not. longest: tokens of the longest text of all.
    """

    tokenizer: PreTrainedTokenizerBase
    special: SpecialTokens
    train: Comparisons
    evaluation: Comparisons
    reference: Comparisons | None
    longest: int


def load_data(options: argparse.Namespace, config, objective: Objective, context: DistributedContext) -> Data:
    """Read and tokenise what the flags name, and check that the objective can learn from it.

    Args:
        config: of the model, its text part.

    Raises:
        UserError: unreadable or unusable data, or texts longer than the model's positions.
    """
    tokenizer = load_tokenizer(options.model_name_or_path, options.add_eot_token)
    special = choose_special_tokens(tokenizer, config.vocab_size, int(options.add_eot_token))
    preprocessing = PreprocessingConfig(
        max_seq_len=options.max_seq_len,
        on_bad_row=options.on_bad_row,
        cache=cache_folder(options),
        processes=options.num_proc,
        lack=objective.lack,
    )
    train, evaluation = load_comparisons(
        options.data_path, options.eval_data_path, tokenizer, special, preprocessing, options.seed, options.data_split
    )
    objective.require_rows(train)
    known = {None: None, "train": train, "eval": evaluation}
    if options.normalize_scores in known:
        reference = known[options.normalize_scores]
    else:
        reference = load_answers(options.normalize_scores, tokenizer, special, preprocessing, options.seed)
    longest = int(max(part.lengths.max() for part in (train, evaluation, reference) if part is not None))
    require_positions(config, tokenizer, longest)
    if "prior_cosine" in objective.kinds:
        train = answer_similarity.with_cosines(train, tokenizer, options.prior_model, context)
    return Data(tokenizer, special, train, evaluation, reference, longest)


def require_positions(config, tokenizer, longest: int) -> None:
    """Raises UserError if the longest text has more tokens than the model has positions."""
    # RoBERTa's kind numbers its positions from 2 and says so only in its tokenizer
    positions = min(getattr(config, "max_position_embeddings", None) or math.inf, tokenizer.model_max_length)
    if longest > positions:
        raise UserError(
            f"the longest text has {longest} tokens, the model {positions} positions: --max_seq_len {positions}"
        )


def prepare(
    options: argparse.Namespace,
    context: DistributedContext,
    objective: Objective,
    data: Data,
    ds_config: dict,
    folder: Path | None,
) -> Trainer:
    """The model, its engine and everything around them, ready to train."""
    thresholds = objective.start_thresholds(data.train)
    partitioned = partition_while_loading(ds_config)
    scorer = build_scorer(options, data.special.rows)
    for part in (scorer.config, scorer.config.get_text_config()):
        part.pad_token_id = data.special.pad
    saving.forget_scale(scorer.config)
    if thresholds is not None:
        scorer.thresholds = Thresholds(thresholds, DTYPES[options.dtype])
    if folder:
        open_folder(folder, context, scorer, options)
    planner = Planner(options, context, objective.by_row)
    most = options.eval_iters * options.per_device_eval_batch_size * context.world_size
    groups = planner.training_groups(data.train), planner.evaluation_groups(data.evaluation, most)
    steps = sum(len(planner.epoch(groups[0], epoch, SEPARATE.layout)) for epoch in range(options.num_train_epochs))
    engine = start_engine(options, scorer, ds_config, steps)
    del partitioned
    torch.manual_seed(options.seed + context.rank)  # dropout: another stream on each rank
    device, dtype = context.device, DTYPES[options.dtype]
    forward = ForwardPass(engine, scorer, dtype, device, data.special.pad, options.max_responses)
    records = Records(folder, engine.monitor, context.is_first)
    rows = data.train, data.evaluation
    trainer = Trainer(options, context, engine, forward, objective, planner, records, rows, groups, steps)
    say(described(trainer, ds_config["train_batch_size"]))
    say(forward.choose_attention(data.longest))
    for line in planner.advice(groups[0], forward.layout.kind):
        say(line)
    if not folder:
        say("no --output_dir: nothing will be saved")
    return trainer


def open_folder(folder: Path, context: DistributedContext, scorer: Scorer, options: argparse.Namespace) -> None:
    """Make the output folder, and write the flags into it, while an error costs nothing yet.

    Raises:
        UserError: it cannot be made, or there is no room for the model.
    """
    size = sum(count(p) for p in scorer.parameters()) * torch.finfo(DTYPES[options.dtype]).bits // 8
    if context.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder}: {error.strerror}") from error
        saving.require_space(folder, size * (2 if options.save_format == "both" else 1))
        settings = {name: value for name, value in vars(options).items() if name != "explicit"}
        versions = {"reward_model": reward_model.__version__, "torch": torch.__version__}
        write_text(folder / "run.json", json.dumps(settings | {"versions": versions}, indent=2, default=str) + "\n")


def described(trainer: Trainer, global_batch: int) -> str:
    """What is going to be done, in a line."""
    options, context, by_row = trainer.options, trainer.context, trainer.objective.by_row
    sizes = [(0 if by_row else part.pairs.sum()) or len(part) for part in (trainer.train_set, trainer.eval_set)]
    what = "rows" if by_row else "pairs"
    elements = "prompts" if options.batch_element == "prompt" else what
    brought = f" in {len(trainer.groups)} groups" if options.merge == "prompt" else ""
    return (
        f"{sizes[0]} training {what}{brought}, {sizes[1]} held out; global batch {global_batch} = "
        f"{options.per_device_train_batch_size} {elements} × {options.gradient_accumulation_steps} accumulated × "
        f"{context.world_size} {'process' if context.world_size == 1 else 'processes'}; {trainer.total_steps} steps; "
        f"{context.device.type}, {options.dtype}, ZeRO {options.zero_stage}{', offload' if options.offload else ''}"
    )


def keep_scale(trainer: Trainer, reference: Comparisons | None) -> None:
    """Write what scores mean to the config that is saved; with reference rows, give them standard deviation 1."""
    forward, planner, scale = trainer.forward, trainer.planner, 1.0
    if reference is not None:
        groups = planner.evaluation_groups(reference, ROWS_TO_NORMALISE_BY)
        plan = planner.evaluation(groups, forward.layout.kind)
        before, after = score_scale.normalize(
            forward, lambda: planner.load(reference, plan, forward.layout), trainer.context
        )
        scale = forward.scorer.config.score_std
        trainer.records.add(
            {"split": "normalise", "step": trainer.total_steps}
            | asdict(before)
            | {"mean_after": after.mean, "std_after": after.std}
        )
        say(
            f"scores of {before.answers} answers had mean {before.mean:.4f} and standard deviation "
            f"{scale:.4f}; the saved head gives {after.std:.4f}, its mean {after.mean:.4f} is in config.json"
        )
    score_scale.keep_thresholds(forward.scorer, trainer.objective.lowest_grade, scale)


def summarize(trainer: Trainer, folder: Path | None) -> None:
    """What a user wants to know at the end."""
    for number, line in enumerate(summary(trainer.last.metrics, trainer.objective.names)):
        say(line if number else f"\n{line}")
    if folder:
        say(f"model:   {folder}\npicture: {folder / 'report.png'}")
    else:
        say("nothing was saved: there was no --output_dir")
