# SPDX-License-Identifier: Apache-2.0
"""A run: data, model, DeepSpeed engine, steps, evaluations, and what is left behind.

Notation: n rows, s tokens, p pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import get_scheduler, set_seed

import reward_model
from reward_model.batching.collate import Batch, Layout, Loading, loader
from reward_model.batching.groups import Units, row_sizes, rows_by_prompt, rows_to_evaluate, single_rows
from reward_model.batching.plan import EpochPlan, MicroBatch, Rule, plan_evaluation
from reward_model.common import distributed
from reward_model.common.distributed import Place
from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import say
from reward_model.config.deepspeed import build_config
from reward_model.config.options import cache_folder, explain_inherited, refuse_used_folder
from reward_model.data.comparisons import Comparisons
from reward_model.data.preprocessing import Rules, load_answers, load_comparisons
from reward_model.data.tokenizer import choose_special_tokens, load_tokenizer
from reward_model.evaluation import pictures as report
from reward_model.evaluation.metrics import pair_metrics, point_metrics
from reward_model.models import saving as checkpoint
from reward_model.models import shared_prefix as sharing
from reward_model.models.loading import DTYPES, load_for_training, read_config
from reward_model.models.lora import add_lora
from reward_model.models.scorer import Scorer, count, divide_head, embedding_rows, gathered, resize_embedding
from reward_model.objectives import answer_similarity as prior
from reward_model.objectives.losses import Thresholds
from reward_model.objectives.objective import Objective

BETAS = (0.9, 0.95)  # upstream's
STEPS_TO_JUDGE_BY = 200  # enough for a share of pads to two digits
ROWS_TO_NORMALISE_BY = 4_096  # their standard deviation is known to about 1 %; OpenAI took 256


def run(options: argparse.Namespace) -> None:
    """Train, evaluate and save as the flags say.

    Raises:
        UserError: whatever the user can mend.
    """
    folder = Path(options.output_dir) if options.output_dir else None
    if folder:
        refuse_used_folder(folder)
    place = distributed.start(options)
    explain_inherited(options)
    options.dtype = options.dtype or distributed.default_dtype()
    distributed.require_dtype(options.dtype)
    set_seed(options.seed)
    config = read_config(options.model_name_or_path)
    text = config.get_text_config()
    ds_config = build_config(options, place.world_size, text.hidden_size, text.vocab_size)
    distributed.require_zero(ds_config["zero_optimization"], options.nvme_path)

    tokenizer = load_tokenizer(options.model_name_or_path, options.add_eot_token)
    special = choose_special_tokens(tokenizer, config.get_text_config().vocab_size, int(options.add_eot_token))
    objective = Objective(options)
    rules = Rules(
        max_seq_len=options.max_seq_len,
        on_bad_row=options.on_bad_row,
        cache=cache_folder(options),
        processes=options.num_proc,
        lack=objective.lack,
    )
    train_set, eval_set = load_comparisons(
        options.data_path, options.eval_data_path, tokenizer, special, rules, options.seed, options.data_split
    )
    objective.require_rows(train_set)
    thresholds = objective.start_thresholds(train_set)
    reference = reference_set(options, train_set, eval_set, tokenizer, special, rules)
    sets = [part for part in (train_set, eval_set, reference) if part is not None]
    longest = int(max(part.lengths.max() for part in sets))
    require_positions(config.get_text_config(), tokenizer, longest)
    if "prior_cosine" in objective.kinds:
        train_set = prior.with_cosines(train_set, tokenizer, options.prior_model, place)
    keep_zero3_alive = _announce_zero3(ds_config)
    scorer = build_scorer(options, special.rows)
    for part in (scorer.config, scorer.config.get_text_config()):
        part.pad_token_id = special.pad
    checkpoint.forget_scale(scorer.config)
    if thresholds is not None:
        scorer.thresholds = Thresholds(thresholds, DTYPES[options.dtype])
    if folder:
        _open_folder(folder, place, scorer, options)
    trainer = Trainer(options, place, scorer, ds_config, train_set, eval_set, special.pad, folder, objective, longest)
    del keep_zero3_alive
    trainer.train()
    trainer.keep_scale(reference)
    trainer.set_attention(sharing.SEPARATE)  # what is saved names no attention of ours
    trainer.engine.empty_partition_cache()  # ZeRO 3 may be fetching ahead, and gathers no weight twice
    if folder:
        checkpoint.save(scorer, tokenizer, folder, options.save_format, is_writer=place.is_first)
        if place.is_first:
            report.draw(folder / "metrics.jsonl", folder / "report.png", trainer.last_scores)
    trainer.summarise()
    torch.distributed.barrier()
    if options.nvme_path:
        distributed.release_swap_files(ds_config["zero_optimization"], options.nvme_path)


def reference_set(options, train_set, eval_set, tokenizer, special, rules: Rules) -> Comparisons | None:
    """The rows that ``--normalize_scores`` names."""
    known = {None: None, "train": train_set, "eval": eval_set}
    if options.normalize_scores in known:
        return known[options.normalize_scores]
    return load_answers(options.normalize_scores, tokenizer, special, rules, options.seed)


def require_positions(config, tokenizer, longest: int) -> None:
    """Raises UserError if the longest text has more tokens than the model has positions."""
    # RoBERTa's kind numbers its positions from 2 and says so only in its tokenizer
    positions = min(getattr(config, "max_position_embeddings", None) or math.inf, tokenizer.model_max_length)
    if longest > positions:
        raise UserError(
            f"the longest text has {longest} tokens, the model {positions} positions: --max_seq_len {positions}"
        )


def _announce_zero3(ds_config: dict):
    """While the returned object lives, Transformers partitions the weights it loads (ZeRO 3)."""
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None


def build_scorer(options: argparse.Namespace, rows: int) -> Scorer:
    """The model as the flags want it, with an embedding of at least ``rows`` rows."""
    scorer = load_for_training(
        options.model_name_or_path, DTYPES[options.dtype], options.seed, options.pooling, options.dropout
    )
    if options.loss_level == "token" and scorer.pooling != "last":
        raise UserError("--loss_level token: this model has no score per token; leave the flag out")
    if options.output_dir and options.save_format != "hf":
        checkpoint.require_dschat(scorer)
    resize_embedding(scorer, rows)
    if options.gradient_checkpointing:
        try:
            # reentrant under ZeRO 3: the other kind compares shapes of weights, which ZeRO 3 empties in between
            reentrant = options.zero_stage == 3
            scorer.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant and options.lora_dim:
                scorer.backbone.enable_input_require_grads()
        except ValueError as error:
            raise UserError(f"--gradient_checkpointing: {first_line(error)}") from error
    if options.lora_dim:
        add_lora(scorer, options.lora_dim, options.lora_alpha or options.lora_dim, options.lora_module_name)
    return scorer


def _open_folder(folder: Path, place: Place, scorer: Scorer, options: argparse.Namespace) -> None:
    size = sum(count(p) for p in scorer.parameters()) * torch.finfo(DTYPES[options.dtype]).bits // 8
    if place.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {folder}: {error.strerror}") from error
        checkpoint.require_space(folder, size * (2 if options.save_format == "both" else 1))
        settings = {name: value for name, value in vars(options).items() if name != "explicit"}
        versions = {"reward_model": reward_model.__version__, "torch": torch.__version__}
        _write(folder / "run.json", json.dumps(settings | {"versions": versions}, indent=2, default=str) + "\n")


class Lines:
    """Standard error for a progress bar that no one sees moving: each state a line of its own."""

    def write(self, text: str) -> None:
        if state := text.strip("\r\n "):
            sys.stderr.write(state + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(*args, **kwargs) -> tqdm:
    """A progress bar; in a log file a line every ten seconds, not ten a second."""
    if sys.stderr.isatty():
        return tqdm(*args, **kwargs)
    return tqdm(*args, **kwargs, mininterval=10.0, delay=10.0, file=Lines(), position=0)


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def parameter_groups(scorer: Scorer, options: argparse.Namespace) -> list[dict]:
    """AdamW's groups: matrices decay, biases and norms do not; LoRA and what is no backbone have learning rates."""
    inside = {id(parameter) for parameter in scorer.backbone.parameters()}
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in scorer.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        rate = options.learning_rate
        if id(parameter) not in inside:
            rate = options.head_learning_rate or rate
        elif is_matrix and "lora_" in name:
            rate = options.lora_learning_rate
        groups.setdefault((rate, options.weight_decay if is_matrix else 0.0), []).append(parameter)
    return [{"params": own, "lr": rate, "weight_decay": decay} for (rate, decay), own in groups.items()]


class Trainer:
    """The DeepSpeed engine and the loop around it."""

    def __init__(
        self,
        options: argparse.Namespace,
        place: Place,
        scorer: Scorer,
        ds_config: dict,
        train_set: Comparisons,
        eval_set: Comparisons,
        pad: int,
        folder: Path | None,
        objective: Objective,
        longest: int,
    ):
        import deepspeed

        self.options, self.place, self.pad, self.folder = options, place, pad, folder
        self.train_set, self.eval_set = train_set, eval_set
        self.objective, self.longest = objective, longest  # of all texts, in tokens
        self.thresholds: torch.Tensor | None = None
        self.last_scores: dict[str, np.ndarray] = {}
        self.last_metrics: dict = {}
        self.way, self.own_attention = sharing.SEPARATE, scorer.backbone.config._attn_implementation
        self.units = self.training_units()
        most = options.eval_iters * options.per_device_eval_batch_size * place.world_size
        self.eval_units = self.units_to_score(eval_set, most)
        self.total_steps = sum(len(self.plan(epoch)) for epoch in range(options.num_train_epochs))
        groups = parameter_groups(scorer, options)
        if options.offload:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer = DeepSpeedCPUAdam(groups, lr=options.learning_rate, betas=BETAS)
        else:
            optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=BETAS, fused=True)
        scheduler = get_scheduler(
            options.lr_scheduler_type,
            optimizer,
            num_warmup_steps=options.num_warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.engine, *_ = deepspeed.initialize(
            model=scorer, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
        )
        if options.zero_stage == 0 and options.dtype != "fp32":
            # DeepSpeed's half-precision optimizer at stage 0 has taken a step with zero gradients by now, which leaves
            # Adam's bias correction one step ahead: the first updates come out at 0.73, 0.83, … of their size
            optimizer.state.clear()
        if options.tokens_per_batch and hasattr(self.engine.optimizer, "gradient_accumulation_steps"):
            # how many micro-batches a step has is not known; ZeRO 1 and 2 with offload ask only whether it is one
            self.engine.optimizer.gradient_accumulation_steps = max(2, options.gradient_accumulation_steps)
        torch.manual_seed(options.seed + place.rank)  # dropout: another stream on each rank
        say(self.describe(ds_config["train_batch_size"]))
        self.way = self.choose_way()
        self.advise()
        if not folder:
            say("no --output_dir: nothing will be saved")

    def describe(self, global_batch: int) -> str:
        """What is going to be done, in a line."""
        options, place = self.options, self.place
        by_row = self.objective.by_row
        sizes = [(0 if by_row else part.pairs.sum()) or len(part) for part in (self.train_set, self.eval_set)]
        what = "rows" if by_row else "pairs"
        elements = "prompts" if options.batch_element == "prompt" else what
        brought = f" in {len(self.units)} groups" if options.merge == "prompt" else ""
        return (
            f"{sizes[0]} training {what}{brought}, {sizes[1]} held out; global batch {global_batch} = "
            f"{options.per_device_train_batch_size} {elements} × {options.gradient_accumulation_steps} accumulated × "
            f"{place.world_size} {'process' if place.world_size == 1 else 'processes'}; {self.total_steps} steps; "
            f"{place.device.type}, {options.dtype}, ZeRO {options.zero_stage}{', offload' if options.offload else ''}"
        )

    def training_units(self) -> Units:
        """The training rows, those of a prompt brought together if that is wanted."""
        options = self.options
        by_row = self.objective.by_row
        if options.merge == "batch":
            return single_rows(self.train_set, by_row)
        most = options.per_device_train_batch_size
        if options.tokens_per_batch:
            most *= options.gradient_accumulation_steps
        if options.batch_element == "prompt":
            most = int(row_sizes(self.train_set, by_row).sum())
        return rows_by_prompt(
            self.train_set,
            options.max_responses,
            most,
            options.seed,
            most_tokens=options.tokens_per_batch,
            by_row=by_row,
        )

    def units_to_score(self, comparisons: Comparisons, most: int) -> Units:
        """Rows to score without training, at most so many (0: all), those of a prompt brought together."""
        options = self.options
        chosen = rows_to_evaluate(len(comparisons), most, options.seed)
        return rows_by_prompt(
            comparisons, options.max_responses, options.per_device_eval_batch_size, options.seed, chosen
        )

    def rule(self, micro_batch: int) -> Rule:
        options = self.options
        return Rule(
            micro_batch=micro_batch,
            accumulation=options.gradient_accumulation_steps,
            by_prompt=options.batch_element == "prompt",
            layout=self.way.layout,
            tokens=options.tokens_per_batch,
            by_length=options.group_by_length,
        )

    def plan(self, epoch: int) -> EpochPlan:
        """This rank's share of an epoch."""
        rule = self.rule(self.options.per_device_train_batch_size)
        return EpochPlan(self.units, rule, self.place.rank, self.place.world_size, self.options.seed, epoch)

    def load(self, comparisons: Comparisons, plan: Sequence[list[MicroBatch]]) -> DataLoader:
        """The batches of a plan, as the model wants them."""
        layout = Layout(self.way.layout, self.pad, self.options.max_responses, self.way.multiple)
        return loader(Loading(comparisons, plan, layout), on_gpu=self.place.device.type == "cuda")

    @torch.no_grad()
    def choose_way(self) -> sharing.Way:
        """The fastest way to share prompts that this model computes rightly; all ranks take the same."""
        scorer, on_gpu = self.engine.module, self.place.device.type == "cuda"
        way = sharing.SEPARATE
        if scorer.pooling != "last":
            said = "prompts are not shared: only a decoder that is scored at the last token can do that"
        elif self.longest > sharing.window(scorer.config):
            said = f"prompts are not shared: the longest text, {self.longest} tokens, is beyond the attention's window"
        else:
            ways = sharing.ON_CUDA if on_gpu else sharing.ON_CPU
            ids = np.random.default_rng(0).integers(embedding_rows(scorer), size=60).tolist()
            with torch.random.fork_rng([self.place.device] if on_gpu else []):
                way, said = sharing.choose(ways, self.small_states, DTYPES[self.options.dtype], ids, self.pad)
        self.set_attention(way)
        say(said)
        return way

    def advise(self) -> None:
        """Say what does not fit the token budget, and what pads cost where a flag would spare much of it."""
        rule, budget = self.rule(self.options.per_device_train_batch_size), self.options.tokens_per_batch
        rows = self.units.texts if rule.layout == "separate" else 1
        over = (rule.width(self.units) * rows > budget).sum() if budget else 0
        if over:
            longest = (rule.width(self.units) * rows).max()
            what = "groups" if self.options.merge == "prompt" else "rows"
            say(f"--tokens_per_batch {budget}: {over} {what} have more, up to {longest}, and stay whole")
        if self.way.layout == "packed" or self.options.group_by_length:
            return
        place = (self.place.rank, self.place.world_size, self.options.seed, 0)
        drawn, grouped = (
            EpochPlan(self.units, replace(rule, by_length=by_length), *place).tokens(STEPS_TO_JUDGE_BY)
            for by_length in (False, True)
        )
        if grouped < 0.8 * drawn:
            say(f"pads: --group_by_length would compute {1 - grouped / drawn:.0%} fewer tokens")

    def set_attention(self, way: sharing.Way) -> None:
        self.way = way
        self.engine.module.backbone.set_attn_implementation(way.attention or self.own_attention)

    def small_states(self, batch: Batch, way: sharing.Way, training: bool) -> torch.Tensor:
        """The hidden state at each response's end, (n, h)."""
        self.set_attention(way)
        self.engine.train(training)
        batch = batch.to(self.place.device)
        return self.scores(batch, batch.ends, states=True)

    def train(self) -> None:
        """All epochs, with an evaluation before the first step, after each epoch, and every ``--eval_interval``."""
        options = self.options
        self.evaluate(step=0, epoch=0)
        bar = progress(total=self.total_steps, desc="training", unit="step", disable=not self.place.is_first)
        log = StepLog(self, bar)
        step = 0
        for epoch in range(options.num_train_epochs):
            self.engine.train()
            plan = self.plan(epoch)
            for done, batches in enumerate(self.load(self.train_set, plan), 1):
                for batch in batches:
                    self.engine.set_gradient_accumulation_boundary(batch is batches[-1])
                    self.train_micro_batch(batch.to(self.place.device), log)
                step += 1
                log.end_step(step, epoch + done / len(plan))
                if done == len(plan) or (options.eval_interval and step % options.eval_interval == 0):
                    log.flush()
                    self.evaluate(step, epoch + done / len(plan))
                    self.engine.train()
                    log.restart_clock()
        log.flush()
        bar.close()

    def train_micro_batch(self, batch: Batch, log: StepLog) -> None:
        loss, chosen, rejected = self.loss(batch)
        loss = loss * batch.weight
        # DeepSpeed takes the mean over the ranks, and here the sum over all micro-batches is meant
        self.engine.backward(loss * self.place.world_size, scale_wrt_gas=False)
        self.engine.step()
        log.add(loss.detach(), chosen.detach(), rejected.detach(), batch)

    def scores(self, batch: Batch, at: torch.Tensor, states: bool = False) -> torch.Tensor:
        """Scores (or hidden states) at tokens of a batch, in the shape of ``at``; float32."""
        shared = self.way is not sharing.SEPARATE
        mask = sharing.attention_mask(batch, self.way, DTYPES[self.options.dtype])
        found = self.engine(
            batch.input_ids, mask, at, position_ids=batch.position_ids if shared else None, states=states
        )
        if isinstance(found, tuple):
            found, self.thresholds = found
        return found

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mean loss of a batch (0-d), and the end scores of its winners and losers (p,); float32."""
        every = None
        if self.options.loss_level == "token":
            every = self.scores(batch, batch.tokens)  # (n, r)
            scores = every[:, -1]  # beyond its end a response repeats its last token
        else:
            scores = self.scores(batch, batch.ends)  # (n,)
        loss = self.objective(batch, scores, every, self.thresholds)
        return loss, scores[batch.better], scores[batch.worse]

    @torch.no_grad()
    def look(
        self, comparisons: Comparisons, units: Units, read: Callable[[Batch, torch.Tensor], list[torch.Tensor]]
    ) -> list[np.ndarray]:
        """Score rows on all ranks, each row once, and put together what is read of each batch.

        Args:
            read: a batch and its scores (n,) → tables with a line for each pair, answer or list of it.
        """
        place, found = self.place, []
        rule = self.rule(self.options.per_device_eval_batch_size)
        plan = plan_evaluation(units, rule, place.rank, place.world_size)
        self.engine.eval()
        batches = self.load(comparisons, [[micro_batch] for micro_batch in plan])
        for (batch,) in progress(batches, desc="evaluating", unit="batch", leave=False, disable=not place.is_first):
            batch = batch.to(place.device)
            tables = read(batch, self.scores(batch, batch.ends))
            found.append([table if batch.weight else table[:0] for table in tables])  # a filler has nothing new
        return [distributed.gather_rows(torch.cat(parts)).cpu().numpy() for parts in zip(*found)]

    def read_judged(self, batch: Batch, scores: torch.Tensor) -> list[torch.Tensor]:
        """What an evaluation needs: pairs' scores and lengths, scored answers, and whether a list's best one won."""
        sides = (batch.better, batch.worse)
        pairs = torch.stack([v[side].float() for v in (scores, batch.response_lengths) for side in sides], dim=1)
        scored = batch.point_weights > 0
        losses = torch.full_like(batch.targets, math.nan)
        if "points" in self.objective.names:
            losses = self.objective.point_losses(batch, scores, self.thresholds)
        right = self.objective.right_labels(batch, scores, self.thresholds)
        points = torch.stack([scores[batch.answers], batch.targets, losses, right], dim=1)[scored]
        absent = batch.ranks < 0
        hits = scores.new_zeros(0, 1)
        if len(batch.ranks):
            best = scores[batch.listed].masked_fill(absent, -math.inf).argmax(1, keepdim=True)
            hits = (batch.ranks.gather(1, best) == 0)[(~absent).sum(1) > 2].float()  # of two answers, the pair tells
        return [pairs, points, hits]

    @torch.no_grad()
    def evaluate(self, step: int, epoch: float) -> None:
        """Score the evaluation rows on all ranks, each once, and record the metrics of the whole set."""
        pairs, points, hits = self.look(self.eval_set, self.eval_units, self.read_judged)
        if not (np.isfinite(pairs).all() and np.isfinite(points[:, 0]).all()):
            raise UserError(f"step {step}: a held-out score is not finite; lower --learning_rate, or take --dtype bf16")
        metrics = {}
        if len(pairs):
            self.last_scores = {"chosen": pairs[:, 0], "rejected": pairs[:, 1]}
            metrics |= pair_metrics(*pairs.T)
        if len(points):
            metrics |= point_metrics(*points.T)
            if not len(pairs):
                self.last_scores = {"scored answers": points[:, 0]}
        if len(hits):
            metrics |= {"lists": len(hits), "best_of_list_accuracy": float(hits.mean())}
        self.last_metrics = m = metrics
        self.record({"split": "eval", "step": step, "epoch": round(epoch, 4)} | metrics)
        said, own = [], self.objective.names
        if "accuracy" in m:
            kind = "loss" if list(own.values()) == ["logistic"] else "logistic loss"
            said.append(
                f"held-out accuracy {m['accuracy']:.4f}, {kind} {m['loss']:.4f}, gap {m['gap_mean']:.3f}, "
                f"chosen {m['chosen_mean']:.3f} ± {m['chosen_std']:.3f}, "
                f"rejected {m['rejected_mean']:.3f} ± {m['rejected_std']:.3f}"
            )
        if "rated" in m:
            loss = f", {own['points']} {m['point_loss']:.4f}" if "point_loss" in m else ""
            label = f", right label {m['label_accuracy']:.4f}" if "label_accuracy" in m else ""
            said.append(f"{m['rated']} scored answers: correlation {m['pearson']:.4f}{loss}{label}")
        say(f"step {step}: {'; '.join(said)}")

    def keep_scale(self, reference: Comparisons | None) -> None:
        """Write what scores mean to the config that is saved; with reference rows, give them standard deviation 1.

        The mean stays where it is, since a head has no bias to take it: it goes to the config, and our scoring
        subtracts it. It is measured after the head was divided, so that it is that of the head as it is stored.
        """
        scorer = self.engine.module
        scale = 1.0
        if reference is not None:
            units = self.units_to_score(reference, ROWS_TO_NORMALISE_BY)
            before = self.spread(reference, units)
            scale = before["std"] or 1.0  # equal scores have no spread to be given
            divide_head(scorer, scale)
            after = self.spread(reference, units)
            scorer.config.score_mean, scorer.config.score_std = after["mean"], scale
            self.record(
                {"split": "normalise", "step": self.total_steps}
                | before
                | {f"{k}_after": after[k] for k in ("mean", "std")}
            )
            say(
                f"scores of {before['answers']} answers had mean {before['mean']:.4f} and standard deviation "
                f"{scale:.4f}; the saved head gives {after['std']:.4f}, its mean {after['mean']:.4f} is in config.json"
            )
        if scorer.thresholds is not None:
            with gathered(list(scorer.thresholds.parameters())), torch.no_grad():
                scorer.config.score_thresholds = (scorer.thresholds().double() / scale).tolist()
            scorer.config.lowest_grade = int(self.objective.lowest_grade)

    def spread(self, comparisons: Comparisons, units: Units) -> dict[str, float | int]:
        """Number, mean and (population) standard deviation of the scores of rows' answers."""
        (scores,) = self.look(comparisons, units, lambda batch, scores: [scores[batch.answers]])
        scores = scores.astype(np.float64)
        return {"answers": len(scores), "mean": float(scores.mean()), "std": float(scores.std())}

    def record(self, values: dict) -> None:
        """Append a line to ``metrics.jsonl``, and hand its numbers to TensorBoard."""
        if not self.place.is_first:
            return
        if self.folder:
            _write(self.folder / "metrics.jsonl", json.dumps(values) + "\n", mode="a")
        if self.engine.monitor.enabled:
            numbers = {k: v for k, v in values.items() if isinstance(v, float) and k != "epoch"}
            self.engine.monitor.write_events(
                [(f"{values['split']}/{name}", number, values["step"]) for name, number in numbers.items()]
            )

    def summarise(self) -> None:
        """What a user wants to know at the end."""
        m = self.last_metrics
        if "accuracy" in m:
            pairs, longer = m["pairs"], m["longer_wins_accuracy"]
            say(f"\nheld-out accuracy {m['accuracy']:.4f} on {pairs} pairs (always the longer answer: {longer:.4f})")
        if "rated" in m and ("points" in self.objective.names or "accuracy" not in m):
            right = f" (right label: {m['label_accuracy']:.4f})" if "label_accuracy" in m else ""
            lead = "" if "accuracy" in m else "\n"
            say(f"{lead}correlation of scores with {m['rated']} held-out targets: {m['pearson']:.4f}{right}")
        if self.folder:
            say(f"model:   {self.folder}\npicture: {self.folder / 'report.png'}")
        else:
            say("nothing was saved: there was no --output_dir")


class StepLog:
    """Sums of a step over its micro-batches and all ranks, read one step late so that no step waits for them."""

    def __init__(self, trainer: Trainer, bar: tqdm):
        self.trainer, self.bar = trainer, bar
        self.sums = self._zeros()
        self.pending = None
        self.clock = time.perf_counter()

    def _zeros(self) -> torch.Tensor:
        # loss, pairs, correct, chosen scores, rejected scores, tokens, those and pads, ranks' forward passes, rows
        return torch.zeros(9, dtype=torch.float64, device=self.trainer.place.device)

    def add(self, loss: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, batch: Batch) -> None:
        """Count a micro-batch: its weighted loss (0-d) and the scores of its winners and losers (p,)."""
        self.sums[0] += loss
        self.sums[6] += batch.input_ids.numel()
        self.sums[7] += 1
        if batch.weight:
            correct = (chosen > rejected).double() + 0.5 * (chosen == rejected)
            parts = (torch.ones_like(correct), correct, chosen, rejected)
            self.sums[1:5] += torch.stack([part.sum(dtype=torch.float64) for part in parts])
            self.sums[5] += batch.attention_mask.sum()
            self.sums[8] += len(batch.row_weights)

    def end_step(self, step: int, epoch: float) -> None:
        """Begin to add up the ranks, and report the step before."""
        work = distributed.sum_over_ranks(self.sums)
        engine = self.trainer.engine
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        ended = (step, epoch, seconds, self.sums, work, engine.get_lr()[0], engine.get_global_grad_norm())
        self.flush()
        self.pending = ended
        self.sums = self._zeros()

    def flush(self) -> None:
        """Report the step that is pending, if there is one."""
        if self.pending is None:
            return
        step, epoch, seconds, sums, work, learning_rate, grad_norm = self.pending
        self.pending = None
        work.wait()
        loss, pairs, correct, chosen, rejected, tokens, computed, passes, rows = sums.tolist()
        if not math.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss}; lower --learning_rate, or take --dtype bf16")
        values = {
            "split": "train",
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate,
            "rows": int(rows),
            "pairs": int(pairs),
            "tokens": int(tokens),
            "padding": round(1 - tokens / computed, 4),
            "micro_batches": int(passes) // self.trainer.place.world_size,
            "rows_per_second": rows / seconds,
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": tokens / seconds,
        }
        if pairs:
            values["accuracy"] = correct / pairs
            values["gap"] = (chosen - rejected) / pairs
            values["chosen_mean"], values["rejected_mean"] = chosen / pairs, rejected / pairs
        if grad_norm is not None:  # DeepSpeed keeps none at stage 0 in float32
            values["grad_norm"] = float(grad_norm)
        self.trainer.record(values)
        shown = {"loss": f"{loss:.3f}"}
        if pairs:
            shown |= {"acc": f"{values['accuracy']:.2f}", "gap": f"{values['gap']:.2f}"}
        shown |= {"pairs_s": f"{pairs / seconds:.0f}"} if pairs else {"rows_s": f"{rows / seconds:.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def restart_clock(self) -> None:
        """Leave what happens in between, an evaluation say, out of the speed."""
        self.clock = time.perf_counter()
