# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of each parameter, whole, however many processes wrote it and whatever ZeRO divided.

A run on another number of processes starts from it, and ``reward-model export`` makes a model of it. DeepSpeed's own
way there, the universal checkpoint, is a conversion beside the run that unpickles whatever the files contain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reward_model.common.errors import UserError
from reward_model.models.scorer import Scorer, gathered
from reward_model.training.checkpoint import ENGINE, Checkpoint
from reward_model.training.engine_files import load_file

RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt$")
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam


@dataclass(frozen=True)
class Parameter:
    """One parameter of a checkpoint, flat, float32: its weight, and Adam's moments by name."""

    weight: torch.Tensor
    moments: dict[str, torch.Tensor]


class WholeState:
    """A checkpoint's engine files, opened; their tensors stay on the disk until they are asked for.

    Raises:
        UserError: they are not those of a run with ZeRO 1, 2 or 3, as far as parameters are asked for.
    """

    def __init__(self, checkpoint: Checkpoint):
        folder = checkpoint.folder / ENGINE
        self.checkpoint = checkpoint
        self.optimizers = [_opened(path)["optimizer_state_dict"] for path in _by_rank(folder, "optim")]
        models = _by_rank(folder, "model") or sorted(folder.glob("mp_rank_00_model_states.pt"))
        if not models:
            raise UserError(f"{folder} has no model")
        self.model = _opened(models[0])
        self.stage = int(self.optimizers[0]["zero_stage"]) if self.optimizers else 0

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Every parameter that trains, by its name in the module."""
        if not self.optimizers:
            raise UserError(f"{self.checkpoint.folder} was written without ZeRO")
        yield from (self._of_partitions() if self.stage == 3 else self._of_fragments())

    def _of_fragments(self) -> Iterator[tuple[str, Parameter]]:
        """ZeRO 1 and 2: a rank has one flat part of each group, and says which parts of which parameters lie in it."""
        for group, mapping in enumerate(_merged(each["param_slice_mappings"] for each in self.optimizers)):
            for name in mapping:
                weights, moments = [], {key: [] for key in MOMENTS}  # type: ignore[var-annotated]
                for rank in self.optimizers:
                    place = rank["param_slice_mappings"][group].get(name)
                    if place is None:
                        continue
                    part = slice(place.start, place.start + place.numel)
                    weights.append(rank["single_partition_of_fp32_groups"][group][part])
                    for key in MOMENTS:
                        moments[key].append(rank["base_optimizer_state"]["state"][group][key].flatten()[part])
                yield name, Parameter(torch.cat(weights), {key: torch.cat(parts) for key, parts in moments.items()})

    def _of_partitions(self) -> Iterator[tuple[str, Parameter]]:
        """ZeRO 3: every rank has an equal part of each parameter, the last one filled up with zeros."""
        ranks = len(self.optimizers)
        for group, shapes in enumerate(self.model["param_shapes"]):
            begin = 0
            for name, shape in shapes.items():
                size = -(-shape.numel() // ranks)
                part = slice(begin, begin + size)
                begin += size
                weight = torch.cat([each["fp32_flat_groups"][group][part] for each in self.optimizers])
                moments = {
                    key: torch.cat(
                        [each["optimizer_state_dict"]["state"][group][key][part] for each in self.optimizers]
                    )
                    for key in MOMENTS
                }
                whole = slice(shape.numel())
                yield name, Parameter(weight[whole], {key: value[whole] for key, value in moments.items()})

    def optimizer_step(self) -> Any:
        """That Adam has counted, a tensor or a number as its kind keeps it."""
        first = self.optimizers[0]
        states = first["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]["state"]
        step = next(iter(states.values()))["step"]
        return step.clone() if torch.is_tensor(step) else step

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that train, and buffers, by name; flat where ZeRO 3 divided them."""
        if self.stage != 3:
            yield from self.model["module"].items()
            return
        yield from ((name, each.weight) for name, each in self.parameters())


def _opened(path: Path) -> Any:
    return load_file(str(path), mapped=True)


def _by_rank(folder: Path, kind: str) -> list[Path]:
    """The files of all ranks, of the model or of the optimizer, in the order of the ranks."""
    found = [(RANK.search(path.name), path) for path in folder.glob(f"*_{kind}_states.pt")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def _merged(mappings: Iterator[list[dict[str, Any]]]) -> list[dict[str, None]]:
    """The names of each group's parameters, which no rank needs to have all of."""
    groups: list[dict[str, None]] = []
    for mapping in mappings:
        groups += [{} for _ in range(len(mapping) - len(groups))]
        for names, more in zip(groups, mapping):
            names.update(dict.fromkeys(more))
    return groups


@dataclass(frozen=True)
class Place:
    """A rank's part of a parameter: ``size`` numbers from ``of`` of the whole, at ``begin`` of a flat tensor."""

    flat: torch.Tensor
    begin: int
    of: int
    size: int

    def take(self, into: torch.Tensor, whole: torch.Tensor) -> None:
        """Copy this rank's part of a whole parameter."""
        into[self.begin : self.begin + self.size].copy_(whole[self.of : self.of + self.size])


def places(engine: Any) -> dict[str, Place]:
    """Of every parameter of which ZeRO 1, 2 or 3 gives this rank a part, by its name."""
    optimizer, names = engine.optimizer, engine.param_names
    found = {}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups):
            begin = 0
            for parameter in group:
                size = -(-parameter.ds_numel // engine.world_size)
                of = engine.global_rank * size
                found[names[parameter]] = Place(flat, begin, of, max(0, min(size, parameter.ds_numel - of)))
                begin += size
        return found
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                own, of = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
                found[names[parameter]] = Place(flat, own.start, of.start, own.numel)
    return found


@torch.no_grad()
def spread(state: WholeState, engine: Any) -> None:
    """Give an engine of any number of processes, with ZeRO 1, 2 or 3, what a checkpoint says; every rank calls it.

    Raises:
        UserError: the checkpoint lacks a parameter.
    """
    own = {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    here, moments = places(engine), engine.optimizer.optimizer.state
    for place in here.values():
        if not moments[place.flat]:
            zeros = {key: torch.zeros_like(place.flat) for key in MOMENTS}
            moments[place.flat] = {"step": state.optimizer_step(), **zeros}
    missing = set(own)
    for name, each in state.parameters():
        missing.discard(name)
        with gathered([own[name]], modify=True):
            if own[name].numel() == each.weight.numel():
                own[name].copy_(each.weight.view(own[name].shape))
        if name in here:
            place = here[name]
            place.take(place.flat, each.weight)
            for key, whole in each.moments.items():
                place.take(moments[place.flat][key], whole)
    if missing:
        raise UserError(f"{state.checkpoint.folder} lacks {len(missing)} parameters, such as {min(missing)}")
    saved = state.model
    engine.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    for group, rate in zip(engine.optimizer.param_groups, engine.lr_scheduler.get_last_lr()):
        group["lr"] = rate
    engine.global_steps, engine.skipped_steps = saved["global_steps"], saved["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    if scale := state.optimizers[0].get("loss_scaler"):
        engine.optimizer.loss_scaler = scale


@torch.no_grad()
def fill(scorer: Scorer, state: WholeState) -> None:
    """Give a whole model on the host the weights of a checkpoint; those that did not train stay.

    Raises:
        UserError: the checkpoint lacks a weight that trains.
    """
    own = dict(scorer.named_parameters()) | dict(scorer.named_buffers())
    missing = {name for name, each in scorer.named_parameters() if each.requires_grad}
    for name, weight in state.weights():
        if name in own and weight.numel() == own[name].numel():
            own[name].copy_(weight.view(own[name].shape))
            missing.discard(name)
    if missing:
        raise UserError(f"{state.checkpoint.folder} lacks {len(missing)} weights, such as {min(missing)}")
