# SPDX-License-Identifier: Apache-2.0
"""Novelty fitted from Python: what ``reward-model novelty fit`` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reward_model.common.errors import UserError
from reward_model.common.logging import logger
from reward_model.common.progress import progress
from reward_model.common.words import counted
from reward_model.config.groups import DataConfig
from reward_model.config.novelty import NoveltyConfig
from reward_model.data.comparisons import Comparison, Comparisons
from reward_model.data.preprocessing import PreprocessingConfig, load_training_texts
from reward_model.data.sources import Splits
from reward_model.inference import RewardScorer, load_to_read
from reward_model.models.scorer import head_layer
from reward_model.novelty.fitted import METHODS, Novelty, fingerprint
from reward_model.novelty.sample import drawn, held_out

PART = 256  # texts whose states are computed between two steps of the bar
LEAST = 20  # texts; a fifth of them are held out
FEW = 100  # held-out texts; the threshold of 0.95 is then the sixth highest of them


def fit_novelty(model: str, config: NoveltyConfig) -> dict[str, Any]:
    """Fit novelty to the training texts of a model, and write it beside the model, from where scoring takes it.

    >>> import reward_model
    >>> config = reward_model.NoveltyConfig(data=["demo/data/train.jsonl"])
    >>> reward_model.fit_novelty("demo/output", config)["held_out"]  # doctest: +SKIP
    120

    Returns:
        ``method``, ``texts`` that it was fitted to, ``held_out`` texts, ``by`` (``prompts`` or ``texts``), ``found``
        different texts, ``threshold``, ``seed`` and ``file``.

    Raises:
        UserError: no folder of a model, data that cannot be used, or too few texts.
    """
    if not config.data:
        raise UserError("give --data: the files, folders or hub names that the model was trained on")
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"{model}: no such folder, and novelty is written beside the model")
    reward, reading = load_to_read(
        model, config.dtype, config.device, config.chat, config.chat_template, config.max_seq_len,
        config.trust_remote_code, novelty=False,
    )  # fmt: skip
    method = METHODS[config.method]
    heads = head_layer(reward.scorer).weight if reward.scorer.heads > 1 else None
    if method.needs_heads and heads is None:
        method.fit(torch.empty(0, 0), config.seed)  # says why not, before anything is computed
    preprocessing = PreprocessingConfig(
        max_seq_len=reading.max_seq_len,
        on_bad_row=config.on_bad_row,
        cache=DataConfig(data_output_path=config.data_output_path).cache_folder,
        processes=config.num_proc,
        names=DataConfig(columns=config.columns).names,
        splits=Splits(config.split, None),
        chat=reading.chat,
        pairs=reward.encoding.pairs,
    )
    data = load_training_texts(config.data, reward.tokenizer, reward.special, preprocessing, config.seed)
    texts, _, counts = data.texts()
    places = drawn(texts, config.max_texts, config.seed)
    if len(places) < LEAST:
        raise UserError(f"--data has {counted(len(places), 'different text')}: novelty needs {LEAST} at least")
    rows = np.repeat(np.arange(len(data)), counts)
    is_held, by_prompt = held_out(texts[places], data.prompt_hashes()[rows[places]], config.seed)
    states = _states(reward, data, places, rows, counts, config.tokens_per_batch)
    if not torch.isfinite(states).all():
        raise UserError("a state is not finite; --dtype fp32 has a wider range")
    known, unknown = states[torch.from_numpy(~is_held)], states[torch.from_numpy(is_held)]
    density = method.fit(known, config.seed, heads)
    about = {
        "method": config.method,
        "texts": len(known),
        "held_out": len(unknown),
        "by": "prompts" if by_prompt else "texts",
        "found": len(np.unique(texts)),
        "threshold": config.threshold,
        "seed": config.seed,
    }
    if len(unknown) < FEW:
        logger.warning(
            f"novelty is a share of {counted(len(unknown), 'held-out text')}, known to {1 / len(unknown):.2g} at best: "
            "give more --data before it decides anything"
        )
    fitted = Novelty.of(density, unknown, config.threshold, fingerprint(reward.scorer), about)
    return about | {"file": str(fitted.save(folder))}


def _states(
    reward: RewardScorer, data: Comparisons, places: np.ndarray, rows: np.ndarray, counts: np.ndarray, tokens: int
) -> torch.Tensor:
    """The states of texts at some places, in their order, (n, h); those of a prompt go through the model together."""
    order = np.argsort(data.prompt_hashes()[rows[places]], kind="stable")
    first = np.cumsum(counts) - counts
    found: torch.Tensor | None = None
    done = 0
    bar = progress(total=len(places), desc="states", unit="text")
    for part in _parts(order, PART):
        together: dict[tuple[int, ...], list[tuple[int, Comparison]]] = {}
        for which in part:
            place = places[which]
            row = rows[place]
            text = data[int(row)].text(int(place - first[row]))
            key = (*text.prompt, int(text.two_segments))
            together.setdefault(key, []).append((int(which), text))
        merged = [
            Comparison(each[0][1].prompt, [text.responses[0] for _, text in each], two_segments=each[0][1].two_segments)
            for each in together.values()
        ]
        states = reward.states_of_rows(merged, tokens)
        if found is None:
            found = torch.empty(len(places), states.shape[1])
        found[[which for each in together.values() for which, _ in each]] = states
        done += len(part)
        bar.update(len(part))
    bar.close()
    assert found is not None  # there are texts
    return found


def _parts(values: Sequence[int] | np.ndarray, size: int) -> Iterator[list[int]]:
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part
