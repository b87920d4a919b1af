# SPDX-License-Identifier: Apache-2.0
"""Writing a trained model, in one of three forms.

- Transformers' own: ``AutoModelForSequenceClassification`` loads it (safetensors, one label, pad token set).
- Sentence-Transformers' modules, for what Transformers has no class for (``--pooling mean``, decoders without a
  sequence-classification class): :mod:`reward_model.models.st_modules`.
- DeepSpeed-Chat's: ``pytorch_model.bin`` with ``rwtransformer.*`` and ``v_head.weight``, for upstream's step 3.

Files are written beside their place and moved there when all are complete.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_model.common.errors import UserError
from reward_model.common.files import flush_folder, flush_tree, remove_folder
from reward_model.common.logging import logger
from reward_model.common.pulse import beat
from reward_model.common.words import in_bytes
from reward_model.models.for_transformers_4 import write_old_keys
from reward_model.models.lora import OF_SCORES, merge_lora, save_adapter
from reward_model.models.many_heads import Tensors, split_state, tell_heads, write_heads
from reward_model.models.quantization import dequantized, is_quantized
from reward_model.models.scorer import SCORE_PAIRS, Scorer, embedding_name, gathered
from reward_model.models.st_modules import require_modules, write_modules
from reward_model.reward_model import RewardModel

TAGS = ("reward-model", "reward-trainer")  # of the model, as TRL's trainer has the second
DSCHAT_WEIGHTS = "pytorch_model.bin"
NOT_FOR_TRANSFORMERS = "none-for-Transformers-since-pytorch_model.bin-is-DeepSpeed-Chats.safetensors"  # in its error
NAMING = "reward_model"  # the field of config.json that says what the model is, for people and other programs
SCALE = tuple(name for name in OF_SCORES if name not in (NAMING, SCORE_PAIRS))  # those that say what its scores mean
NOVELTY = "novelty/novelty.safetensors"  # what reward-model novelty fit has learned of weights, beside these
OPENRLHF = ("value_head_prefix", "mean", "std")  # fields that its loader reads; it gives (score - mean) / std


def require_dschat(scorer: Scorer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError if a model cannot be saved for DeepSpeed-Chat."""
    if scorer.pooling != "last":
        raise UserError(f"--save_format dschat: step 3 scores the last token, this model's pooling is {scorer.pooling}")
    largest, rows = max(tokenizer.get_vocab().values()), _dschat_rows(tokenizer)
    if largest >= rows:
        raise UserError(
            f"--save_format dschat: step 3 keeps {rows} rows for the tokenizer's {len(tokenizer)} tokens, and the "
            f"largest id is {largest}; take --save_format hf"
        )


def _dschat_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that upstream fits its embedding to."""
    return 8 * -(-len(tokenizer) // 8)


def require_space(folder: Path, need: int) -> None:
    """Raises UserError if fewer than ``need`` bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"--output_dir {folder}: {in_bytes(free)} free, the model takes {in_bytes(need)}")


def save(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    save_format: str = "hf",
    is_writer: bool = True,
    make_room: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Write a model with its tokenizer; LoRA merged, its adapter in ``adapter/``. Called by every rank.

    Args:
        save_format: ``hf``, ``dschat`` or ``both``, in one folder; or one that :func:`require_form` knows.
        is_writer: this rank writes; the others only give their part of the weights.
        make_room: called when the disk is full; whether it has freed some, so that another try is worth it.

    Returns:
        The names of what was written into the folder; none on a rank that writes nothing.

    Raises:
        UserError: the disk is full or takes no files, or the model has no DeepSpeed-Chat form.
    """
    beat("to gather the model's weights")
    state = whole_state_dict(scorer.model, keep=is_writer)
    beat("to save the model")
    if not is_writer:
        return []
    state, heads = split_state(scorer, state)
    tell_raw_score(scorer.config)
    tell_heads(scorer)
    staging = folder / ".saving"
    while True:
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            _write_forms(scorer, tokenizer, staging, save_format, state, heads)
            return _move_into(folder, staging)
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)
            # safetensors and torch.save have exceptions of their own for a write that fails
            is_full = any(words in str(error) for words in ("No space left", "Disk quota", "PytorchStreamWriter"))
            if is_full and make_room():
                continue
            if is_full or isinstance(error, OSError):
                why = "no space left on the disk" if is_full else getattr(error, "strerror", None) or str(error)
                raise UserError(f"{folder}: {why}: the model was not saved") from error
            raise


def _write_forms(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    save_format: str,
    state: Tensors,
    heads: Tensors,
) -> None:
    """Write all that belongs to a saved model; heads: several, of which ``state`` has the mean."""
    if hasattr(scorer.model, "peft_config"):
        save_adapter(scorer, tokenizer, folder / "adapter", state)
        if (folder / "adapter").is_dir():
            write_heads(heads, folder / "adapter")
        state = merge_lora(scorer, state)
    write_heads(heads, folder)
    tokenizer.save_pretrained(folder)
    if save_format == "sentence-transformers":
        write_modules(scorer, tokenizer, state, folder)
    if save_format in ("hf", "hf4", "both", "openrlhf"):
        _save_for_loading(scorer, state, tokenizer, folder)
    if save_format in ("dschat", "both"):
        _save_dschat(scorer, state, tokenizer, folder)
    if save_format == "openrlhf":
        _tell_openrlhf(folder)
    lacking = write_old_keys(folder)
    if lacking and save_format == "hf4":
        raise UserError(f"--to hf4: Transformers 4 has no setting for {lacking}")
    if lacking:
        logger.warning(f"score with Transformers 5 only: Transformers 4 has no setting for {lacking}")


def _move_into(folder: Path, staging: Path) -> list[str]:
    """Move what was written into its place, once it is on the disk; the names."""
    _share(staging)
    flush_tree(staging)
    names = sorted(item.name for item in staging.iterdir())
    remove_novelty(folder)
    for name in names:
        if (folder / name).is_dir():  # of a save that was cut short
            remove_folder(folder / name)
        os.replace(staging / name, folder / name)
    staging.rmdir()
    flush_folder(folder)
    return names


def remove_novelty(folder: Path) -> None:
    """Remove what was fitted to the weights that lie in a folder, since others take their place; it is said."""
    for file in (folder / NOVELTY, folder / "adapter" / NOVELTY):
        if file.is_file():
            file.unlink()
            with suppress(OSError):  # something else lies there
                file.parent.rmdir()
            logger.warning(f"removed {file}: it was fitted to the weights before; run reward-model novelty fit again")


def _share(folder: Path) -> None:
    """Give files the permissions that the user's umask asks for; safetensors lets only their owner read them."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def tell_raw_score(config) -> None:
    """Write into a config that its one label is a score: other programs would put a sigmoid on it.

    ``problem_type`` is for Transformers' pipeline and vLLM's classify, ``function_to_apply`` for whoever asks the
    pipeline's name for it, ``sentence_transformers`` for CrossEncoder.
    """
    config.problem_type = "regression"
    config.function_to_apply = "none"
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}


def forget_scale(config) -> None:
    """Take out of a config what an earlier training said of its scores, and what other trainers did."""
    of_openrlhf = OPENRLHF if hasattr(config, OPENRLHF[0]) else ()
    for name in (*SCALE, NAMING, *of_openrlhf):
        if hasattr(config, name):
            delattr(config, name)


def whole_state_dict(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Every weight on the host, gathered one by one under ZeRO 3, dequantized; an empty dict where nothing is kept."""
    state = {}
    tensors = model.state_dict(keep_vars=True)
    packed = {f"{name}.weight": layer for name, layer in model.named_modules() if is_quantized(layer)}
    own = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    for name, tensor in tensors.items():
        with gathered([tensor]):
            if keep and (name in own or not packed):  # not the scales of quantized layers
                whole = dequantized(packed[name]) if name in packed else tensor.detach()
                state[name] = whole.to("cpu", copy=True).contiguous()
    return state


def _save_for_loading(scorer: Scorer, state: dict[str, torch.Tensor], tokenizer, folder: Path) -> None:
    """Transformers' form, or where it has no class for the model, Sentence-Transformers'."""
    model = scorer.unwrapped
    if isinstance(model, PreTrainedModel):
        model.add_model_tags(list(TAGS))  # for whoever pushes the model from Python
        model.save_pretrained(folder, state_dict=state)
        return
    scorer.backbone.add_model_tags(list(TAGS))
    write_modules(scorer, tokenizer, state, folder)
    logger.info(
        "saved as modules of Sentence-Transformers, which SentenceTransformer, vLLM's embed and "
        "reward_model.inference.load read: Transformers has no class that scores this way, and its "
        "AutoModelForSequenceClassification would draw a new head"
    )


def require_openrlhf(scorer: Scorer) -> None:
    """Raises UserError if OpenRLHF has no model that scores as this one does."""
    if scorer.pooling != "last" or not isinstance(scorer.unwrapped, PreTrainedModel):
        has_no = "has no classification class in Transformers"
        why = has_no if scorer.pooling == "last" else f"is scored otherwise (pooling {scorer.pooling})"
        raise UserError(
            f"--to openrlhf: its reward model is a decoder with a linear layer on the last token, and this one {why}"
        )


def _tell_openrlhf(folder: Path) -> None:
    """Name the head and the scale in ``config.json`` as OpenRLHF's reward model reads them; the weights are the same.

    Its ``normalize_reward`` gives (score - mean) / std; the head of a normalized model was divided already.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= dict(zip(OPENRLHF, ("score", config.get("score_mean", 0.0), 1.0)))
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def require_form(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, to: str) -> None:
    """Raises UserError if a model has no such form (``--to``)."""
    if to == "dschat":
        require_dschat(scorer, tokenizer)
    elif to == "sentence-transformers":
        require_modules(scorer, f"--to {to}")
    elif to == "openrlhf":
        require_openrlhf(scorer)


def _save_dschat(scorer: Scorer, state: dict[str, torch.Tensor], tokenizer, folder: Path) -> None:
    require_dschat(scorer, tokenizer)
    model = scorer.unwrapped
    backbone = "rwtransformer." if isinstance(model, RewardModel) else model.base_model_prefix + "."
    head = "v_head.weight" if isinstance(model, RewardModel) else "score.weight"
    renamed = {
        "rwtransformer." + name.removeprefix(backbone): weight
        for name, weight in state.items()
        if name.startswith(backbone)
    }
    renamed["v_head.weight"] = state[head]
    rows = _dschat_rows(tokenizer)
    _fit_vocabulary(scorer, renamed, rows)
    if not (folder / "config.json").exists():
        config = copy.deepcopy(model.config)
        config.get_text_config().vocab_size = rows
        config.save_pretrained(folder)
    if not any(folder.glob("model*.safetensors")):
        _keep_transformers_out(folder)
    torch.save(renamed, folder / DSCHAT_WEIGHTS)


def _keep_transformers_out(folder: Path) -> None:
    """Have Transformers' loaders fail on a folder that holds DeepSpeed-Chat's form alone.

    They would find no key that they know in ``pytorch_model.bin``, and take random weights for all of them. This index
    comes first in their search, and names a file that is not there; step 3 reads config and ``pytorch_model.bin`` only.
    """
    index = {"metadata": {"total_size": 0}, "weight_map": {"v_head.weight": NOT_FOR_TRANSFORMERS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    logger.info(
        f"{DSCHAT_WEIGHTS} is for DeepSpeed-Chat's step 3 and reward_model.inference.load; Transformers will refuse "
        "this folder: --save_format both (export: --to hf) writes what it loads"
    )


def _fit_vocabulary(scorer: Scorer, state: dict[str, torch.Tensor], rows: int) -> None:
    """Upstream fits its embedding to the tokenizer, in multiples of 8, before it loads: give it as many rows.

    Patched, it keeps a larger embedding, and fills up what it reads with rows that no token has.
    """
    name = f"rwtransformer.{embedding_name(scorer)}"
    embedding = state[name]
    missing = max(0, rows - len(embedding))
    state[name] = torch.cat([embedding[:rows], embedding.new_zeros(missing, embedding.shape[1])])
