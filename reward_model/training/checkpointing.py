# SPDX-License-Identifier: Apache-2.0
"""When a run writes a checkpoint, what goes into it, and how an engine takes it back."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from reward_model.common import distributed
from reward_model.common.distributed import DistributedContext
from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.words import in_bytes
from reward_model.config.groups import OutputConfig
from reward_model.config.settings import Settings
from reward_model.models.loading import DTYPES
from reward_model.models.scorer import Scorer, count
from reward_model.training import checkpoint, random_states
from reward_model.training.best import Best, write_weights
from reward_model.training.checkpoint import Checkpoint, Writer
from reward_model.training.engine_files import engine_files
from reward_model.training.whole_state import WholeState, spread

# bytes of a parameter that trains: weights, the optimizer's float32 copy, and two moments in float32
BYTES = {"fp32": 16, "bf16": 14, "fp16": 14}
# tried with DeepSpeed 0.19.8, parameters and optimizer there: after a resume the loss was that of the untrained model
ON_NVME = "DeepSpeed does not give back what lies on NVMe"
OF_OUTPUT = [*OutputConfig.__dataclass_fields__, "tensorboard_path"]  # a checkpoint may be moved


class Checkpointer:
    """Writes the checkpoints of a run.

    seconds: that the last one took. size: bytes that one takes, measured or estimated.
    """

    def __init__(
        self,
        settings: Settings,
        context: DistributedContext,
        engine: Any,
        scorer: Scorer,
        tokenizer: Any,
        folder: Path | None,
        run: dict[str, Any],
    ):
        """
        Args:
            engine: DeepSpeed's.
            folder: of the output; None: nothing is written.
            run: what ``run.json`` says.
        """
        self.output, self.context, self.engine, self.scorer = settings.output, context, engine, scorer
        self.tokenizer, self.folder = tokenizer, folder
        self.zero_stage, self.offload = settings.engine.zero_stage, settings.engine.offload
        self.takes_apart = settings.training.optim == "adamw_torch_fused"
        parts = (settings.deepspeed.zero.get(name) or {} for name in ("offload_param", "offload_optimizer"))
        self.is_on_nvme = any(part.get("device") == "nvme" for part in parts)
        self.run = {name: value for name, value in run.items() if name not in OF_OUTPUT}
        self.files = engine_files()
        engine.checkpoint_engine = self.files
        engine._copy_recovery_script = lambda path: None  # reward-model export does that; a full disk would hang ranks
        self.seconds, self.last_step = 0.0, -1
        self.has_frozen = any(not parameter.requires_grad for parameter in scorer.parameters())
        self.size = expected_size(scorer, settings)
        bits = torch.finfo(DTYPES[settings.engine.dtype]).bits
        self.model_size = sum(count(parameter) for parameter in scorer.parameters()) * bits // 8

    def announce(self, total_steps: int) -> None:
        """Say what checkpoints will take of the disk, if there will be any, and whether that is there."""
        interval, kept = self.output.save_interval, self.output.keep_checkpoints
        if self.folder and self.is_on_nvme:
            logger.warning(
                f"no checkpoints, so that an interrupted run is lost: {ON_NVME}; --offload keeps all in memory"
            )
        if self.folder is None or not interval or interval > total_steps or self.is_on_nvme:
            return
        count_of = min(kept, total_steps // interval) + 1
        free = shutil.disk_usage(self.folder).free
        line = (
            f"checkpoints: every {interval} steps, {in_bytes(self.size)} each, {count_of} on the disk at most; "
            f"{in_bytes(free)} free"
        )
        if free < count_of * self.size:
            logger.warning(f"{line}: they will not all fit, and what does not fit is left out")
        else:
            logger.info(line)

    def is_due(self, step: int) -> bool:
        """Whether a step is one after which a checkpoint is written."""
        interval = self.output.save_interval
        return bool(self.folder and interval and step % interval == 0 and not self.is_on_nvme)

    def save(self, step: int, state: dict[str, Any]) -> str:
        """Write a checkpoint; every rank calls it at the end of the same step.

        One that cannot be written ends nothing by itself: that is said, and what was there stays.

        Args:
            state: of the trainer.

        Returns:
            Why none was written, in a line; empty: one was.
        """
        if self.folder is None:
            return "there is no --output_dir"
        if self.is_on_nvme:
            return ON_NVME
        begun = time.monotonic()
        problem = self._made_room(self.folder) if self.context.is_first else ""
        problem = distributed.first_text(problem)
        if not problem:
            versions = self.run["versions"]
            written, problem = checkpoint.commit(
                self.folder, step, self.context, versions, lambda writer: self._write(writer, state)
            )
        if problem:
            logger.warning(f"step {step}: no checkpoint could be written: {problem}")
            return problem
        self.last_step, self.seconds = step, distributed.largest(time.monotonic() - begun)
        if self.context.is_first:
            self.size = checkpoint.size_of(written.folder)
            checkpoint.prune(self.folder, self.output.keep_checkpoints)
        logger.info(f"step {step}: checkpoint written in {self.seconds:.1f} s, {in_bytes(self.size)}")
        return ""

    def _made_room(self, folder: Path) -> str:
        """:meth:`_no_room`, after all but the newest checkpoint were removed if that is needed."""
        problem = self._no_room(folder)
        if problem and checkpoint.prune(folder, 1):
            return self._no_room(folder)
        return problem

    def _no_room(self, folder: Path) -> str:
        """Why the disk has no room for a checkpoint and, later, the model; empty: it has."""
        free = shutil.disk_usage(folder).free if folder.is_dir() else None
        if free is None or free >= self.size + self.model_size:
            return ""
        needed = f"a checkpoint takes {in_bytes(self.size)}, the model {in_bytes(self.model_size)}"
        return f"{folder} has {in_bytes(free)} free; {needed}"

    def _write(self, writer: Writer, state: dict[str, Any]) -> None:
        """This rank's files."""
        if self.context.is_first:
            writer.write_bytes(checkpoint.STATE, _json(state))
            writer.write_bytes("run.json", _json(self.run))
            writer.write_bytes("config.json", _json(self.scorer.config.to_dict()))
            self._write_tokenizer(writer)
            if (best := self.best_file) and best.is_file():
                writer.link(checkpoint.BEST, best)
        writer.write_bytes(f"random/{self.context.rank:05}.safetensors", random_states.captured(self.context.device))
        self.files.writer = writer
        self.engine.save_checkpoint(
            str(writer.folder), tag=checkpoint.ENGINE, save_latest=False, exclude_frozen_parameters=self.has_frozen
        )
        self.files.writer = None

    def _write_tokenizer(self, writer: Writer) -> None:
        try:
            self.tokenizer.save_pretrained(writer.folder / checkpoint.TOKENIZER)
        except OSError as error:
            writer.problem = writer.problem or f"{writer.folder}: {error.strerror}"

    @property
    def best_file(self) -> Path | None:
        """Where the weights of the best evaluation lie; None: there is no output folder."""
        return self.folder / checkpoint.FOLDER / checkpoint.BEST if self.folder else None

    def save_best(self, best: Best) -> None:
        """Write the weights as those of the best evaluation; every rank calls it.

        Raises:
            UserError: they cannot be written.
        """
        assert self.best_file is not None
        problem = distributed.first_text(write_weights(self.scorer, self.best_file, self.context.is_first))
        if problem:
            raise UserError(f"step {best.step}: the best weights so far could not be written: {problem}")

    def restore(self, start: Checkpoint) -> None:
        """Give the engine what a checkpoint has, of any number of processes; before any forward pass, on every rank.

        Raises:
            UserError: it is of another number of processes, with an optimizer that is not taken apart here, or the
                model lies on NVMe.
        """
        if self.is_on_nvme:
            raise UserError(f"{start.folder}: no run goes on from there, as {ON_NVME}; name a new folder")
        processes = start.manifest()["world_size"]
        if processes == self.context.world_size or not self.zero_stage:
            strict = not self.has_frozen
            self.engine.load_checkpoint(str(start.folder), tag=checkpoint.ENGINE, load_module_strict=strict)
        elif self.takes_apart:
            spread(WholeState(start), self.engine)
        else:
            raise UserError(f"{start.folder} is of {processes} processes: --optim adamw_8bit goes on with as many")
        if self.offload:
            replay_steps(self.engine.optimizer.optimizer)
        self.last_step = start.step
        self.restore_best(start)

    def restore_best(self, start: Checkpoint) -> None:
        """Put the best weights of a checkpoint back beside it."""
        kept = start.folder / checkpoint.BEST
        if self.context.is_first and kept.is_file() and self.best_file:
            self.best_file.parent.mkdir(parents=True, exist_ok=True)
            self.best_file.unlink(missing_ok=True)
            shutil.copyfile(kept, self.best_file)

    def restore_random(self, start: Checkpoint) -> None:
        """Give this rank its random states back; the last thing before training goes on."""
        path = start.folder / "random" / f"{self.context.rank:05}.safetensors"
        if path.is_file():
            random_states.restore(path.read_bytes(), self.context.device)


def replay_steps(adam: Any) -> None:
    """Have DeepSpeed's AdamW for the CPU count again to the step that its state has.

    It keeps β₁ᵗ and β₂ᵗ outside that state, multiplied step by step. A new one takes them from ``pow``, whose rounding
    differs, and with it that of every update.
    """
    steps = max((int(state["step"]) for state in adam.state.values() if "step" in state), default=0)
    beta1, beta2 = adam.param_groups[0]["betas"]
    number = torch.zeros(1)
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id, step, 0.0, beta1, beta2, 1e-8, 0.0, True, number, number, number.clone(), number.clone()
        )


def expected_size(scorer: Scorer, settings: Settings) -> int:
    """Bytes of a checkpoint, before one was written: some 16 for each parameter that trains in float32, else 14.

    With LoRA the base is not in it.
    """
    trained = sum(count(parameter) for parameter in scorer.parameters() if parameter.requires_grad)
    return BYTES[settings.engine.dtype] * trained


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True, default=str) + "\n").encode()
