# SPDX-License-Identifier: Apache-2.0
"""Several score heads on one backbone (``--heads``): where they begin, their mean, and their file beside a saved model.

The linear layer that makes the score has K outputs, and the score is their mean. K linear heads average to one: the
saved model has that one, as any other model has it, and ``heads/heads.safetensors`` beside it has all of them. The file
lies in a folder of its own, since vLLM reads every ``*.safetensors`` that lies beside ``config.json`` as weights.

Read of RewardUQ (arXiv 2602.24040): the abstract and the code of package ``rewarduq`` (``mlp_head_ensemble`` and
``metrics.py``), not the paper's text. Its heads are MLPs of two layers on a frozen backbone, without a bootstrap; here
they are linear, and the backbone trains with them.

Notation: K heads, h hidden units.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from reward_model.batching.identity import seeded
from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.models.scorer import Scorer, gathered, head_layer
from reward_model.reward_model import ValueHead, at_least_float32

FOLDER, FILE = "heads", "heads.safetensors"
COUNT, BETA = "score_heads", "score_beta"  # fields of config.json: K, and β of the lower bound r − β·u
DEFAULT_BETA = 1.0
Tensors = dict[str, torch.Tensor]  # ``weight`` (K, h), and ``bias`` (K,) where the head has one


class Heads(ValueHead):
    """K score heads in one linear map, (…, h) → (…, K), multiplied in float32 at least.

    initial, initial_bias: where they began, (K, h) and (K,), which no file has: they follow from the seed and from the
    model that the run starts from. distance: mean over the heads of ‖w − w₀‖², as of the last call, for
    ``--head_anchor``; None: nobody asks for it. It is computed here, since ZeRO 3 has the whole of a weight only while
    its own layer computes.
    """

    anchored: bool
    distance: torch.Tensor | None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.distance = self._distance() if self.anchored and torch.is_grad_enabled() else None
        return super().forward(hidden)

    def _distance(self) -> torch.Tensor:
        """Squares are summed over a head's weights, its bias among them, and averaged over the heads; ()."""
        parts = [(self.weight, self.initial)] + ([] if self.bias is None else [(self.bias, self.initial_bias)])
        squares = [(at_least_float32(now) - at_least_float32(then)).square().sum() for now, then in parts]
        return torch.stack(squares).sum() / self.out_features


def drawn(count: int, width: int, seed: int) -> torch.Tensor:
    """New weights of so many heads, (K, h), each N(0, 1/(h+1)²) by a generator of its own, from seed and number."""
    rows = []
    for number in range(count):
        own = seeded(("score head", number, "seed", seed))
        generator = torch.Generator().manual_seed(own & (2**63 - 1))
        rows.append(torch.randn(width, generator=generator) / (width + 1))
    return torch.stack(rows)


@torch.no_grad()
def set_heads(scorer: Scorer, weight: torch.Tensor, bias: torch.Tensor | None, anchored: bool = False) -> None:
    """Give a model so many heads, in place of its one; before LoRA and before the engine.

    The layer stays the module that it is, so that whatever refers to it goes on doing so. Under ZeRO 3 its new weight
    is whole until DeepSpeed starts, as an adapter's is.

    Args:
        weight: (K, h). bias: (K,); None: the head has none.
        anchored: the layer computes how far it is from these.
    """
    layer = head_layer(scorer)
    kind, device = layer.weight.dtype, layer.weight.device
    if bias is None and layer.bias is not None:
        bias = torch.zeros(len(weight))
    layer.weight = nn.Parameter(weight.to(device, kind, copy=True).contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device, kind, copy=True).contiguous())
    layer.out_features = scorer.heads = len(weight)
    layer.__class__ = Heads
    assert isinstance(layer, Heads)
    layer.anchored, layer.distance = anchored, None
    if anchored:
        layer.register_buffer("initial", layer.weight.detach().clone(), persistent=False)
        if layer.bias is not None:
            layer.register_buffer("initial_bias", layer.bias.detach().clone(), persistent=False)


def begin_heads(scorer: Scorer, count: int, seed: int, name_or_path: str, is_new: bool, anchored: bool = False) -> None:
    """Give a model that is going to be trained its heads: new ones, those it was saved with, or its own and draws.

    Args:
        is_new: the model has no trained head. One that has gets its weights plus those of :func:`drawn`; if it was
            saved with as many heads, these as they are.
    """
    layer = head_layer(scorer)
    there = None if is_new else read_heads(name_or_path, scorer)
    if there is not None and len(there["weight"]) == count:
        require_their_mean(scorer, there, name_or_path)
        set_heads(scorer, there["weight"], there.get("bias"), anchored)
        logger.info(f"heads: the {count} of {name_or_path}")
        return
    weight, bias = drawn(count, layer.in_features, seed), None
    how = "new, each drawn by itself"
    if not is_new:
        own = mean_head(scorer)
        weight = weight + own["weight"]
        bias = own["bias"].repeat(count) if "bias" in own else None
        had = f"the {len(there['weight'])} heads of {name_or_path} are not read: " if there else ""
        how = f"{had}each begins with {'their mean' if there else 'the loaded head'}, moved by a draw of its own"
    set_heads(scorer, weight, bias, anchored)
    logger.info(f"heads: {count}, {how}")


def say_left(scorer: Scorer, name_or_path: str) -> None:
    """Say of a model with several heads that one is trained, their mean."""
    count = getattr(scorer.config, COUNT, 1)
    if count > 1:
        logger.warning(
            f"{name_or_path} has {count} heads: their mean is trained, as one; --heads {count} trains all of them"
        )


def mean_head(scorer: Scorer) -> Tensors:
    """The one head that all heads average to, float32 on the host: weight (1, h), and bias (1,) if there is one."""
    layer = head_layer(scorer)
    found = {}
    for name, parameter in layer.named_parameters():
        with gathered([parameter]):
            found[name] = parameter.detach().float().mean(0, keepdim=True).cpu()
    return found


def split_state(scorer: Scorer, state: Tensors) -> tuple[Tensors, Tensors]:
    """All weights of a model → the same with the mean head in place of its heads, and the heads; {}: it has one.

    Args:
        state: as the model names them, whole and on the host.
    """
    if scorer.heads == 1:
        return state, {}
    layer = head_layer(scorer)
    parameters = dict(layer.named_parameters())
    found, changed = {}, dict(state)
    for name, parameter in scorer.model.named_parameters(remove_duplicate=False):
        for kind, own in parameters.items():
            if parameter is own:
                found[kind] = state[name]
                changed[name] = state[name].float().mean(0, keepdim=True).to(state[name].dtype)
    return changed, found


def write_heads(heads: Tensors, folder: Path) -> None:
    """Write heads beside a saved model; nothing where it has one."""
    if heads:
        (folder / FOLDER).mkdir(exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in heads.items()}
        save_file(tensors, folder / FOLDER / FILE, metadata={"format": "pt"})


def file_of(name_or_path: str | Path) -> Path | None:
    """The file of heads that lies beside a model, in a folder or on the hub; None: there is none."""
    if Path(name_or_path).is_dir():
        file = Path(name_or_path) / FOLDER / FILE
        return file if file.is_file() else None
    try:
        return Path(str(cached_file(str(name_or_path), f"{FOLDER}/{FILE}")))
    except OSError:  # the hub has none, or cannot be reached
        return None


def read_heads(name_or_path: str | Path, scorer: Scorer) -> Tensors | None:
    """The heads that a model was saved with; None: it has one, or their file is not there, which is said.

    Raises:
        UserError: the file cannot be read, or holds no such heads.
    """
    count = getattr(scorer.config, COUNT, 1)
    if not isinstance(count, int) or count < 2:
        return None
    file = file_of(name_or_path)
    if file is None:
        logger.warning(f"{name_or_path}: its config.json names {count} heads, and {FOLDER}/{FILE} is not there")
        return None
    try:
        tensors = load_file(file)
    except Exception as error:  # OSError, and safetensors' own
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layer = head_layer(scorer)
    wanted = {"weight": (count, layer.in_features)} | ({} if layer.bias is None else {"bias": (count,)})
    if shapes != wanted:
        raise UserError(f"{file} holds {shapes}, and {counted(count, 'head')} of this model would be {wanted}")
    return tensors


def require_their_mean(scorer: Scorer, heads: Tensors, name_or_path: str | Path) -> None:
    """Raises UserError if a model's one head is not the mean of its heads, to the rounding of their dtypes."""
    for name, own in mean_head(scorer).items():
        kinds = head_layer(scorer).weight.dtype, heads[name].dtype
        unit = max(torch.finfo(kind).eps for kind in kinds)
        mean, size = heads[name].float().mean(0, keepdim=True), heads[name].float().abs().max()
        if not ((own - mean).abs() <= unit * size).all():
            raise UserError(
                f"{name_or_path}: {FOLDER}/{FILE} does not average to the model's score head, so that one of the two "
                "was changed by another program; remove the folder to score without a standard deviation"
            )


def take_heads(scorer: Scorer, name_or_path: str | Path) -> None:
    """Give a loaded model the heads that it was saved with, if it was.

    Raises:
        UserError: they do not belong to it.
    """
    heads = read_heads(name_or_path, scorer)
    if heads is None:
        tell_heads(scorer)  # what is saved from here on has one
        return
    require_their_mean(scorer, heads, name_or_path)
    set_heads(scorer, heads["weight"], heads.get("bias"))


def tell_heads(scorer: Scorer) -> None:
    """Write how many heads there are to the config that is saved, and β of the lower bound, if there are several."""
    if scorer.heads > 1:
        setattr(scorer.config, COUNT, scorer.heads)
        setattr(scorer.config, BETA, beta_of(scorer))
        return
    for name in (COUNT, BETA):
        if hasattr(scorer.config, name):
            delattr(scorer.config, name)


def beta_of(scorer: Scorer) -> float:
    """β of the lower bound r − β·u, as ``config.json`` says it, or 1.

    Raises:
        UserError: it is no number from 0 on.
    """
    beta = getattr(scorer.config, BETA, DEFAULT_BETA)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < float("inf"):
        raise UserError(f"{BETA} in config.json is {beta}: give a number from 0 on")
    return float(beta)
