# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration to its files: data, model, engine, training, and what is left behind."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import set_seed

from reward_model.batching.batch import Batch
from reward_model.batching.groups import RowGroups
from reward_model.batching.layout import Layout
from reward_model.batching.planner import Planner
from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.locking import locked
from reward_model.common.logging import logger
from reward_model.common.pulse import beat
from reward_model.common.words import counted
from reward_model.config.groups import TrainingConfig
from reward_model.config.options import (
    RunConfig,
    explain_inherited,
    read_run,
    require_data,
    require_usable_folder,
)
from reward_model.config.settings import Settings, resolve
from reward_model.data.comparisons import Comparisons
from reward_model.data.tokenizer import SpecialTokens
from reward_model.evaluation import score_scale
from reward_model.evaluation.evaluate import summary
from reward_model.models import adapters, saving
from reward_model.models.attention import SEPARATE
from reward_model.models.forward import ForwardPass
from reward_model.models.loading import DTYPES, is_reward_model, read_config
from reward_model.models.many_heads import tell_heads
from reward_model.models.scorer import Scorer
from reward_model.models.term_needs import require_what_terms_need
from reward_model.objectives.losses import Thresholds
from reward_model.objectives.objective import Objective
from reward_model.reporting.report import FILE as REPORT
from reward_model.reporting.report import report
from reward_model.training import hub, verify, watchdog
from reward_model.training.best import read_weights
from reward_model.training.checkpoint import prune
from reward_model.training.checkpointing import Checkpointer
from reward_model.training.compiling import compile_layers
from reward_model.training.data import Data, load_data
from reward_model.training.engine import build_scorer, partition_while_loading, start_engine
from reward_model.training.held_out import keep_temperature, write_evaluation
from reward_model.training.meta import MetaStep
from reward_model.training.model_card import Trained, card_of, write_card
from reward_model.training.naming import name_model
from reward_model.training.output_folder import described_by, mark, open_folder
from reward_model.training.records import Records
from reward_model.training.resume import FINISHED, INTERRUPTED, Start, choose_start
from reward_model.training.stopping import Interrupted, StopRequest
from reward_model.training.trackers import Trackers
from reward_model.training.trainer import Trainer

ROWS_TO_BEGIN_BY = 256  # OpenAI's number
ROWS_TO_NORMALIZE_BY = 4_096  # their standard deviation is known to about 1 %; OpenAI took 256


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    metrics: of its last evaluation, as the last ``eval`` line of ``metrics.jsonl`` has them; ``accuracy``, ``loss``, …
    Where there are several evaluation sets, of the first one.
    sets: name of an evaluation set → its metrics; the name is '' for one that has none.
    steps: of the optimizer.
    folder: holds the model, ``metrics.jsonl`` and ``run.json``; None: there was no ``--output_dir``.
    report: the page of the run, ``report.html``.
    """

    metrics: dict[str, Any]
    steps: int
    folder: Path | None = None
    report: Path | None = None
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, sets: dict[str, dict[str, Any]], steps: int, folder: Path | None) -> TrainResult:
        """With the metrics of each evaluation set, the first of which are the run's."""
        page = folder / REPORT if folder else None
        return cls(dict(next(iter(sets.values()))), steps, folder, page, sets)


@watchdog.while_it_runs
def run(config: RunConfig) -> TrainResult:
    """Train, evaluate and save as a configuration says; every rank calls it.

    Raises:
        UserError: whatever the user can mend.
        Interrupted: the run was asked to end, and the same command goes on from its checkpoint.
    """
    require_data(config)
    require_usable_folder(config.output)
    folder = Path(config.output.output_dir) if config.output.output_dir else None
    context = distributed.start(config.engine.local_rank, config.engine.offload, config.output.debug)
    context = distributed.share_texts(context, config.engine.sequence_parallel_size)
    with locked(folder, context, f"--output_dir {folder}"):
        return run_in(folder, config, context, StopRequest(config.output.time_limit))


def run_in(folder: Path | None, config: RunConfig, context: DistributedContext, stop: StopRequest) -> TrainResult:
    """The same in a folder that no other run has."""
    explain_inherited(config)
    config = with_whole_model(config, context)
    model_config = read_config(config.model.model_name_or_path, config.model.trust_remote_code)
    text = model_config.get_text_config()
    default_dtype = distributed.default_dtype()
    if config.engine.dtype != "auto":
        distributed.require_dtype(config.engine.dtype)
    on_gpu = context.device.type == "cuda"
    settings = resolve(config, default_dtype, context.world_size, text.hidden_size, text.vocab_size, on_gpu)
    distributed.require_dtype(settings.engine.dtype)
    distributed.require_zero(settings.deepspeed.zero, settings.engine.nvme_path)
    require_what_terms_need(settings.loss, settings.model, model_config)
    asks_hub = settings.output.push_to_hub and context.is_first
    if problem := distributed.first_text(hub.hindrance(settings.output) if asks_hub else ""):
        raise UserError(problem)
    set_seed(settings.training.seed)
    objective = Objective(settings.loss, settings.training.seed)
    is_trained = is_reward_model(config.model.model_name_or_path, model_config) and not config.model.new_head
    data = load_data(settings, model_config, objective, context, is_trained)
    settings = replace(settings, data=replace(settings.data, pair_encoding=data.encoding.pairs))
    described_run = described_by(settings, context, data)
    start = choose_start(settings.output, described_run, context) if folder else Start()
    if start.finished is not None:
        assert folder is not None
        logger.info(f"{folder} holds this run, finished after {counted(start.finished['step'], 'step')}: nothing to do")
        if line := not_applied(folder, described_run):
            logger.warning(line)
        sets = start.finished.get("sets", {"": start.finished["metrics"]})
        return TrainResult.of(sets, start.finished["step"], folder)
    goes_on = start.checkpoint is not None
    told = {name: value for name, value in described_run.items() if name not in ("content", "special", "given")}
    sections, name = settings.deepspeed.config, settings.output.run_name
    with Trackers.start(sections, context, folder, name, told, goes_on) as trackers:
        try:
            trainer = prepare(settings, context, objective, data, folder, described_run, start, stop, trackers)
        except UserError:
            if folder and context.is_first and not start.checkpoint:
                with suppress(OSError):
                    (folder / "run.json").unlink()  # nothing was trained: the mended command may take the folder
            raise
        watchdog.start(settings.engine.hang_timeout, context)
        with stop.listening():
            try:
                trainer.train()
            except Interrupted:
                if folder and context.is_first:
                    mark(folder, INTERRUPTED, {"step": trainer.step, "signal": stop.reason})
                torch.distributed.barrier()
                release(trainer)
                raise
            take_best(trainer)
            keep_scale(trainer, data.reference)
            keep_temperature(trainer)
            name_model(trainer.forward.scorer, data.tokenizer, described_run)
            if folder:
                saved = save(trainer, data, folder)
                describe(trainer, data, folder, described_run, saved)
                finish(trainer, folder, saved)
        summarize(trainer, folder)
        torch.distributed.barrier()
        release(trainer)
        watchdog.stop()  # trackers and the hub may take long, and the run is over
    if settings.output.push_to_hub and folder and context.is_first:
        hub.push(folder, saved.names, settings.output, settings.model.model_name_or_path)
    return TrainResult.of(trainer.metrics, trainer.step, folder)


def not_applied(folder: Path, described_run: dict[str, Any]) -> str:
    """Which flags of the saved model a finished run was given otherwise, in a line; empty: none."""
    there = read_run(folder / "run.json")
    names = [name for name in ("save_format", "normalize_scores") if there.get(name) != described_run.get(name)]
    found = ", ".join(f"--{name} ({there.get(name)} there, {described_run.get(name)} here)" for name in names)
    return f"{found}: not applied to the model that is there; reward-model export writes it anew" if found else ""


def with_whole_model(config: RunConfig, context: DistributedContext) -> RunConfig:
    """A LoRA adapter to start from is replaced by the model that has it merged; the first rank makes it.

    Raises:
        UserError: it cannot be merged.
    """
    model = config.model
    if not adapters.is_adapter(model.model_name_or_path):
        return config
    found, problem = "", ""
    if context.is_first and (found := adapters.merged_before(model.model_name_or_path)):
        logger.info(f"{model.model_name_or_path} is a LoRA adapter: starting from {found}, where it is merged")
    elif context.is_first:
        try:
            found = adapters.merged(model.model_name_or_path, config.data.cache_folder, model.trust_remote_code)
        except UserError as error:
            problem = str(error)
    if problem := distributed.first_text(problem):
        raise UserError(problem)
    return replace(config, model=replace(model, model_name_or_path=distributed.first_text(found)))


def prepare(
    settings: Settings,
    context: DistributedContext,
    objective: Objective,
    data: Data,
    folder: Path | None,
    described_run: dict[str, Any],
    start: Start,
    stop: StopRequest,
    trackers: Trackers,
) -> Trainer:
    """The model, its engine and everything around them, ready to train, at the first step or where a run was."""
    thresholds = objective.start_thresholds(data.train)
    partitioned = partition_while_loading(settings.deepspeed.config)
    scorer = build_scorer(settings, data.special.rows)
    set_pad(scorer, data.special)
    scorer.read_with(data.encoding)
    saving.forget_scale(scorer.config)
    tell_heads(scorer)
    dtype, seed = DTYPES[settings.engine.dtype], settings.training.seed
    if thresholds is not None:
        scorer.thresholds = Thresholds(thresholds, dtype)
    scorer.keeps_states = settings.loss.reads_states
    eval_batch = settings.evaluation.per_device_eval_batch_size
    draws = settings.model.heads > 1
    planner = Planner(settings.batches, eval_batch, seed, context, objective.by_row, draws)
    most = settings.evaluation.eval_iters * eval_batch * context.data_size
    train = data.train, planner.training_groups(data.train)
    held_out = {name: (rows, planner.evaluation_groups(rows, most)) for name, rows in data.evaluation.items()}
    steps = steps_of_epochs(planner, train[1], settings.training)
    if start.steps is not None and start.steps >= steps[1]:
        raise UserError(
            f"--output_dir {folder}: that run is finished after {counted(start.steps, 'step')}, and these flags ask "
            f"for {steps[1]}: give it more steps, or name a new folder"
        )
    if folder:
        open_folder(folder, context, scorer, settings, data, described_run)
    if settings.training.normalize_before and not start.checkpoint:
        begin_at_one(scorer, settings, context, planner, data)
    engine = start_engine(settings, scorer, steps[1])
    del partitioned
    checkpointer = Checkpointer(settings, context, engine, scorer, data.tokenizer, folder, described_run)
    if start.checkpoint:
        checkpointer.restore(start.checkpoint)
    torch.manual_seed(seed + context.rank)  # dropout: another stream on each rank
    most_responses, pad = settings.batches.max_responses, data.special.pad
    forward = ForwardPass(engine, scorer, dtype, context.device, pad, most_responses, context.sequence)
    records = Records(folder, trackers, context.is_first)
    meta = start_meta(settings, forward, context, data)
    trainer = Trainer(
        settings,
        context,
        engine,
        forward,
        objective,
        planner,
        records,
        train,
        held_out,
        steps,
        checkpointer,
        stop,
        meta,
    )
    logger.info(described(trainer))
    if len(held_out) > 1:
        logger.info(
            f"evaluation sets: {', '.join(map(called, held_out))}; what is best, and the result, go by the first"
        )
    forward.require_scores(data.special.end)

    def to_time(layout: Layout) -> list[Batch]:
        return planner.first(*train, layout)

    attention = settings.batches.attention
    if start.checkpoint and context.sequence.size == 1:
        attention = start.state["attention"]  # another one would round otherwise
    logger.info(forward.choose_attention(data.longest, attention, to_time))
    if settings.loss.contrastive_weight:
        forward.require_two_views(data.special.end)
        logger.info(
            "contrastive term: each response is told from the others of one forward pass of one process, so that the "
            "numbers depend on --per_device_train_batch_size and on the number of processes"
        )
    if settings.engine.compile:
        logger.info(compile_layers(scorer, settings.model.gradient_checkpointing))
    for line in planner.advice(train[1], forward.layout.kind):
        logger.warning(line)
    if not folder:
        logger.warning("no --output_dir: nothing will be saved")
    checkpointer.announce(trainer.total_steps)
    if start.checkpoint:
        trainer.restore(start.state)
        checkpointer.restore_random(start.checkpoint)
        logger.info(f"resumed from step {trainer.step} of {trainer.total_steps}: {start.checkpoint.folder}")
    return trainer


def begin_at_one(scorer: Scorer, settings: Settings, context: DistributedContext, planner: Planner, data: Data) -> None:
    """With ``--normalize_before``: give the untrained scores of some training rows standard deviation 1."""
    scorer.to(context.device)
    dtype, most = DTYPES[settings.engine.dtype], settings.batches.max_responses
    forward = ForwardPass(scorer, scorer, dtype, context.device, data.special.pad, most)
    plan = planner.evaluation(planner.evaluation_groups(data.train, ROWS_TO_BEGIN_BY), forward.layout.kind)
    found = score_scale.begin_at_one(forward, planner.load(data.train, plan, forward.layout), context)
    logger.info(
        f"the untrained scores of {found.answers} answers had standard deviation {found.std:.4g}; the head was divided "
        "by it (--normalize_before)"
    )


def start_meta(settings: Settings, forward: ForwardPass, context: DistributedContext, data: Data) -> MetaStep | None:
    """What moves the weights towards the rows of ``--meta_data``, and what that costs, said; None: there are none."""
    if data.meta is None:
        return None
    training = settings.training
    rate = training.meta_rate or training.learning_rate
    meta = MetaStep(data.meta, forward, context, rate, training.meta_batch_size, training.seed)
    logger.info(
        f"--meta_data: {counted(len(data.meta), 'prompt')}, {meta.prompts} in a step, rate {rate:g}; a forward and a "
        "backward pass more over these in each step, and a copy of the weights that train"
    )
    return meta


def steps_of_epochs(planner: Planner, groups: RowGroups, training: TrainingConfig) -> tuple[list[int], int]:
    """The steps of each epoch, and those that the run takes: all of them, or ``--max_steps``."""
    steps: list[int] = []
    while sum(steps) < training.max_steps if training.max_steps else len(steps) < training.num_train_epochs:
        steps.append(len(planner.epoch(groups, len(steps), SEPARATE.layout)))
    return steps, training.max_steps or sum(steps)


def set_pad(scorer: Scorer, special: SpecialTokens) -> None:
    """Write the run's pad to the config; says it if this moves the place where a reward model is scored."""
    text = scorer.config.get_text_config()
    has_head = any("SequenceClassification" in name for name in scorer.config.architectures or [])
    if has_head and scorer.pooling == "last" and text.pad_token_id in special.endings:
        logger.warning(
            f"the pad in the model's config.json, {text.pad_token_id}, is a token that ends texts, so that it was "
            f"scored at the token before; from here on the pad is {special.pad}, and it is scored at the end"
        )
    for part in (scorer.config, text):
        part.pad_token_id = special.pad


def described(trainer: Trainer) -> str:
    """What is going to be done, in a line."""
    settings, context, by_row = trainer.settings, trainer.context, trainer.objective.by_row
    batches, engine, optim = settings.batches, settings.engine, settings.training.optim
    parts = trainer.train_set, *(rows for rows, _ in trainer.held_out.values())
    sizes = [(0 if by_row else part.pairs.sum()) or len(part) for part in parts]
    what = "row" if by_row else "pair"
    element = "prompt" if batches.batch_element == "prompt" else what
    each = counted(batches.per_device_train_batch_size, element)
    shares = f"{context.data_size} {'process' if context.data_size == 1 else 'processes'}"
    if context.sequence.size > 1:
        shares = f"{counted(context.data_size, 'group')} of {context.sequence.size} processes that share texts"
    brought = f" in {counted(len(trainer.groups), 'group')}" if batches.merge == "prompt" else ""
    return (
        f"{counted(sizes[0], f'training {what}')}{brought}, {' + '.join(map(str, sizes[1:]))} held out; "
        f"global batch {settings.deepspeed.config['train_batch_size'] // context.sequence.size} = "
        f"{each} × {batches.gradient_accumulation_steps} accumulated × "
        f"{shares}; "
        f"{counted(trainer.total_steps, 'step')}; "
        f"{context.device.type}, {engine.dtype}, ZeRO {engine.zero_stage}{', offload' if engine.offload else ''}"
        f"{'' if optim == 'adamw_torch_fused' else f', {optim}'}"
    )


def called(name: str) -> str:
    """An evaluation set in a list of them."""
    return name or "that without a name"


def take_best(trainer: Trainer) -> None:
    """With ``--keep_best``: the weights of the best evaluation in place of the last, and its numbers."""
    best, file = trainer.best, trainer.checkpointer.best_file
    if not (trainer.settings.evaluation.keep_best and best and best.step and file):
        if not trainer.last.scores:  # the run had been evaluated before it was resumed
            trainer.evaluate_again()
        return
    trainer.engine.empty_partition_cache()
    read_weights(trainer.forward.scorer, file)
    trainer.evaluate_again()
    logger.info(f"what is saved is the best of all evaluations, step {best.step}: {best.by} {best.value:.4f}")


def keep_scale(trainer: Trainer, reference: Comparisons | None) -> None:
    """Write what scores mean to the config that is saved; with reference rows, give them standard deviation 1."""
    forward, planner, scale = trainer.forward, trainer.planner, 1.0
    spread = score_scale.spread_of(np.concatenate([np.zeros(0), *trainer.last.scores.values()]))
    if reference is not None:
        groups = planner.evaluation_groups(reference, ROWS_TO_NORMALIZE_BY)
        plan = planner.evaluation(groups, forward.layout.kind)
        before, after = score_scale.normalize(
            forward, lambda: planner.load(reference, plan, forward.layout), trainer.context
        )
        scale, spread = forward.scorer.config.score_std, after
        trainer.records.add(
            {"split": "normalize", "step": trainer.total_steps}
            | asdict(before)
            | {"mean_after": after.mean, "std_after": after.std}
        )
        logger.info(
            f"scores of {before.answers} answers had mean {before.mean:.4f} and standard deviation "
            f"{scale:.4f}; the saved head gives {after.std:.4f}, its mean {after.mean:.4f} is in config.json"
        )
    if line := score_scale.doubt_mean(forward.dtype, spread.mean, spread.std):
        logger.warning(line)
    score_scale.keep_thresholds(forward.scorer, trainer.objective.lowest_grade, scale)


class Saved(NamedTuple):
    """names: of the files that belong to the model; none but on the first rank. not_verified: why it was not."""

    names: list[str]
    not_verified: str


def save(trainer: Trainer, data: Data, folder: Path) -> Saved:
    """Write the model and the picture of the run, and see to it that the saved model scores as the trained one does.

    Raises:
        UserError: it does not; what was saved is kept under another name.
    """
    forward, is_writer, outcome, problem = trainer.forward, trainer.context.is_first, verify.Outcome(), ""
    forward.use(SEPARATE)  # what is saved names no attention of ours
    expected = verify.expect(forward, trainer.eval_set, data.tokenizer, data.special)
    trainer.engine.empty_partition_cache()  # ZeRO 3 may be fetching ahead, and gathers no weight twice
    save_format = trainer.settings.output.save_format

    def make_room() -> bool:
        removed = prune(folder, 1)
        if removed:
            logger.warning(f"{folder}: the disk is full; removed {counted(removed, 'older checkpoint')} for the model")
        return removed > 0

    names = saving.save(forward.scorer, data.tokenizer, folder, save_format, is_writer, make_room)
    beat("to load what was saved")
    if is_writer:
        write_evaluation(trainer, data.tokenizer, folder)
        write_report(folder)
        forms = ("hf", "dschat") if save_format == "both" else (save_format,)
        outcome = verify.check(
            folder, forms, expected, data.tokenizer, data.special, trainer.settings.model.trust_remote_code
        )
        if outcome.differs:
            kept = verify.set_aside(folder, names)
            problem = f"what was saved is not what was evaluated, and lies in {kept}: {outcome.differs}"
    if problem := distributed.first_text(problem):
        raise UserError(problem)
    return Saved(names, outcome.not_verified)


def describe(trainer: Trainer, data: Data, folder: Path, run: dict[str, Any], saved: Saved) -> None:
    """Write the model card of what was saved."""
    if not trainer.context.is_first:
        return
    best, config = trainer.best, trainer.forward.scorer.config
    is_best = bool(trainer.settings.evaluation.keep_best and best and best.step)
    step = best.step if best and is_best else trainer.step
    scale = {name: getattr(config, name) for name in saving.SCALE if hasattr(config, name)}
    health, naming = trainer.health.state(), getattr(config, saving.NAMING)
    trained = Trained(run, trainer.metrics, step, step, health, scale, naming, saved.not_verified)
    name = trainer.settings.output.hub_model_id or folder.resolve().name
    write_card(folder, card_of(name, saved.names, data.tokenizer, trained))


def write_report(folder: Path) -> None:
    """The page of the run; the model is complete without it."""
    try:
        report(folder, has_ended=True)
    except OSError as error:
        logger.warning(f"{folder / REPORT}: {error.strerror}; the model is complete without the page")


def finish(trainer: Trainer, folder: Path, saved: Saved) -> None:
    """Leave the mark of a finished run, once all that it leaves is on the disk."""
    if not trainer.context.is_first:
        return
    trainer.records.flush()
    if best := trainer.checkpointer.best_file:
        best.unlink(missing_ok=True)
        with suppress(OSError):  # there are checkpoints
            best.parent.rmdir()
    found = {"step": trainer.step, "metrics": trainer.last.metrics, "sets": trainer.metrics}
    mark(folder, FINISHED, found | {"not_verified": saved.not_verified})


def release(trainer: Trainer) -> None:
    """Give back what the engine holds."""
    settings = trainer.settings
    if settings.engine.nvme_path:
        distributed.release_swap_files(settings.deepspeed.zero, settings.engine.nvme_path)
    trainer.engine.destroy()


def summarize(trainer: Trainer, folder: Path | None) -> None:
    """What a user wants to know at the end."""
    sets = trainer.metrics
    lines = [
        f"{name or 'without a name'}: {line}" if len(sets) > 1 else line
        for name, metrics in sets.items()
        for line in summary(metrics, trainer.objective.names)
    ]
    for number, line in enumerate(lines):
        logger.info(line if number else f"\n{line}")
    for line in trainer.health.summary():
        logger.warning(line)
    if folder:
        logger.info(f"model:  {folder}\nreport: {folder / REPORT}")
    else:
        logger.info("nothing was saved: there was no --output_dir")
