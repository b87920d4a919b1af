# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint that the model does not read, and among them the score head of another trainer."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.models.scorer import Scorer, gathered, head_layer

ORDINARY = re.compile(  # that a score needs none of: heads of language models, buffers, poolers, towers for images
    r"(^|\.)(lm_head|embed_out|cls|generator_predictions|discriminator_predictions|generator_lm_head|lm_loss|"
    r"lm_predictions|mask_predictions|pred_layer|predictions|sop_classifier|splinter_qass|pooler|vocab_projector|"
    r"vocab_transform|vocab_layer_norm|final_logits_bias|position_ids|inv_freq|masked_bias|visual|vision_\w+|image_\w+|"
    r"audio_\w+|mtp|nextn)(\.|$)|\.attn\.bias$|\.attention\.bias$|^decoder\.(weight|bias)$|^funnel\.decoder\."
)
PLAIN_HEAD = re.compile(r"(^|\.)head\.")
LANGUAGE_HEAD = re.compile(r"(^|\.)lm_head\.")
HEAD = re.compile(
    r"(^|\.)(\w*(score|reward|regression|critic|value_head|v_head|rm_head|rank_head)\w*|value|classifier)(\.|$)"
)
LAYER = re.compile(r"(^|\.)(layers|h|blocks?|layer)\.\d+\.")
QUANTIZED = re.compile(  # what only a quantized weight has beside it
    r"\.(weight_scale(_inv|_2)?|qweight|qzeros|weight_packed|weight_shape|SCB|absmax|quant_map)$|_proj_(blocks|scales)$"
)
BESIDE = ("value_head.safetensors", "value_head.bin")  # where LLaMA-Factory keeps its head
Shapes = dict[str, tuple[int, ...]]


def unread(name_or_path: str, names: Iterable[str], vocabulary: int, width: int) -> Shapes:
    """The weights of a checkpoint that were not read and that a score might need, with their shapes.

    Args:
        names: those that Transformers did not read.
        vocabulary: rows of a language model's head, which is none of them, whatever its name.
        width: of the hidden states.
    """
    kept = [name for name in names if LANGUAGE_HEAD.search(name) or not ORDINARY.search(name)]
    found = {}
    for name, shape in sorted(shapes_of(name_or_path, kept).items()):
        of_language = shape in ((vocabulary, width), (vocabulary,)) or LANGUAGE_HEAD.search(name)
        if not of_language or shape in ((1, width), (1,)):  # some trainers score with a language head of one row
            found[name] = shape
    return found


def not_read(name_or_path: str, own: Iterable[str], width: int) -> list[str]:
    """Score heads and scales of quantized weights in a checkpoint that a model has no weight for.

    For ZeRO 3, at which Transformers 5 names no unread weights. Inside the layers it may store them otherwise than the
    model has them, so that other unread weights are not told.

    Args:
        own: names of the model's weights.
        width: of the hidden states.
    """
    known = {name for each in own for name in (each, _without_prefix(each))}
    stored = {name: shape for path in _weight_files(name_or_path) for name, shape in _shapes_in(path).items()}
    others = {name: shape for name, shape in stored.items() if not known & {name, _without_prefix(name)}}
    return sorted({*heads_among(others, width), *filter(QUANTIZED.search, others)})


def _without_prefix(name: str) -> str:
    rest = name.partition(".")[2]
    return rest if "." in rest else name


def heads_among(shapes: Shapes, width: int) -> list[str]:
    """Those that seem to be a score head, by their name or by having one output, with its bias."""
    outside = {name: shape for name, shape in shapes.items() if not LAYER.search(name)}
    found = {
        name
        for name, shape in outside.items()
        if HEAD.search(name) or (shape == (1, width) and not re.search("embed|norm|token", name))
    }
    plain = [name for name in outside if PLAIN_HEAD.search(name)]  # a masked language model's, too
    if any(len(outside[name]) == 2 and outside[name][0] == 1 for name in plain):
        found.update(plain)
    return sorted(name for name in outside if name in found or f"{name.removesuffix('bias')}weight" in found)


def adopt_head(scorer: Scorer, name_or_path: str, names: list[str]) -> None:
    """Load the score head that a checkpoint has under another name: one linear layer with one output.

    Args:
        names: of its weights.

    Raises:
        UserError: the head has another form, or the model is scored in another manner.
    """
    tensors = read_weights(name_or_path, names)
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")}
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    layer = head_layer(scorer)
    width = layer.in_features
    if scorer.pooling != "last":
        raise UserError(
            f"{name_or_path} has a score head that {type(scorer.unwrapped).__name__} does not read ({shapes}): "
            "--new_head leaves it out and draws a new one"
        )
    if len(weights) != 1 or next(iter(weights.values())).shape not in ((width,), (1, width)):
        raise UserError(
            f"{name_or_path} has a head that is not one linear layer with one output ({shapes}): --new_head leaves it "
            "out and draws a new one"
        )
    ((name, weight),) = weights.items()
    with gathered([layer.weight], modify=True), torch.no_grad():
        layer.weight.copy_(weight.reshape(1, width))
    logger.info(f"score head: read from {name}")
    say_bias({each: tensor for each, tensor in tensors.items() if each != name})


def adopt_output(scorer: Scorer, model: nn.Module) -> bool:
    """Load the head of a reward model that brings its own class, if it is its only output; whether there is one."""
    output, layer = model.get_output_embeddings(), head_layer(scorer)
    shape = tuple(getattr(output.weight, "ds_shape", output.weight.shape))
    if shape != (1, layer.in_features):
        return False
    with gathered([output.weight, layer.weight], modify=True), torch.no_grad():
        layer.weight.copy_(output.weight)
    logger.info(f"score head: that of {type(model).__name__}")
    if getattr(output, "bias", None) is not None:
        with gathered([output.bias]):
            say_bias({f"the bias of {type(model).__name__}": output.bias.detach()})
    return True


def require_numbers(name_or_path: str, names: Iterable[str]) -> None:
    """Raises UserError for weights that are quantized although config.json does not say so."""
    if scales := sorted(name for name in names if QUANTIZED.search(name)):
        raise UserError(
            f"{name_or_path} is quantized, though its config.json does not say how ({scales[0]}): start from the "
            "checkpoint before quantization"
        )


def say_bias(biases: dict[str, torch.Tensor]) -> None:
    """A head here has no bias, which moves every score alike and the order of none."""
    for name, bias in biases.items():
        logger.warning(f"{name} is not read: every score is {float(bias.flatten()[0]):.4g} lower than with it")


def read_weights(name_or_path: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Some weights of a checkpoint on the host, in float32, from whichever of its files hold them.

    Raises:
        UserError: one cannot be found.
    """
    names = list(names)
    found: dict[str, torch.Tensor] = {}
    for path in _weight_files(name_or_path):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                there = set(file.keys())
                found |= {name: file.get_tensor(name) for name in names if name in there}
        else:
            state = read_pickled(path)
            found |= {name: state[name] for name in names if name in state}
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{name_or_path}: cannot read {missing[0]} from its files; --new_head draws a new head")
    return {name: tensor.float() for name, tensor in found.items()}


def find_weights(name_or_path: str, names: Iterable[str]) -> dict[str, str]:
    """Of some weights those that a checkpoint has, by the name there, which may have more before it (a text part's)."""
    stored = [name for path in _weight_files(name_or_path) for name in _shapes_in(path)]
    found = {}
    for name in names:
        like = [each for each in stored if each == name] or [each for each in stored if each.endswith(f".{name}")]
        if len(like) == 1:
            found[name] = like[0]
    return found


def shapes_of(name_or_path: str, names: Iterable[str]) -> Shapes:
    """The shapes of some weights of a checkpoint, and of those that lie beside it; (), where no file has one.

    Transformers 4 puts the model's prefix before names of a checkpoint that has none; here they are as in the file.
    """
    names = set(names)
    found: Shapes = {}
    for path in _weight_files(name_or_path):
        if not (names or path.name in BESIDE):
            continue
        there = _shapes_in(path)
        wanted = there if path.name in BESIDE else {*names, *(name.partition(".")[2] for name in names)}
        found |= {name: shape for name, shape in there.items() if name in wanted}
    absent = [name for name in names if name not in found and name.partition(".")[2] not in found]
    return found | dict.fromkeys(absent, ())


def _shapes_in(path: Path) -> Shapes:
    if path.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read_pickled(path).items()}
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of ``torch.save``, mapped where it can be, so that host memory holds them once.

    Raises:
        UserError: anything else is in it; a pickle can hold code, and none of it is run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, and what a broken pickle comes to
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(each, torch.Tensor) for each in state.values()):
        raise UserError(f"{path} is no file of weights by name")
    return state


def _weight_files(name_or_path: str) -> list[Path]:
    folder = Path(name_or_path)
    beside = [_beside(name_or_path, name) for name in BESIDE]
    if not folder.is_dir():  # a name of the hub, whose files have just been loaded
        config = cached_file(name_or_path, "config.json", local_files_only=True)
        folder = Path(str(config)).parent
    main = [path for path in sorted(folder.glob("*.safetensors")) if path.name not in BESIDE]
    return (main or sorted(folder.glob("pytorch_model*.bin"))) + [path for path in beside if path]


def _beside(name_or_path: str, name: str) -> Path | None:
    """A file of a checkpoint that Transformers does not look for; None: it has none."""
    if Path(name_or_path).is_dir():
        path = Path(name_or_path, name)
        return path if path.is_file() else None
    try:
        return Path(str(cached_file(name_or_path, name)))
    except OSError:  # the hub has none, or cannot be reached
        return None
