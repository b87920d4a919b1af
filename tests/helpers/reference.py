# SPDX-License-Identifier: Apache-2.0
"""A slow reward model to check the fast one against, and the tiny models and random batches both are given."""

from types import SimpleNamespace

import torch
from torch import nn

PAD = 3
VOCABULARY = 12
TOKENIZER = SimpleNamespace(pad_token_id=PAD)


class TinyBackbone(nn.Module):
    """Causal, nine units wide; two equal rows score differently, as they do under dropout.

    Its model_type is llama, so that upstream passes it no head_mask.
    """

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.config = SimpleNamespace(model_type="llama", hidden_size=9)
        self.embedding = nn.Embedding(VOCABULARY, 9, dtype=dtype)
        self.mixer = nn.Linear(9, 9, dtype=dtype)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=False):
        mixed = self.mixer(self.embedding(input_ids).cumsum(1) / 4)
        row = torch.arange(len(input_ids), device=mixed.device, dtype=mixed.dtype)
        return (torch.tanh(mixed + row.sin()[:, None, None]),)


def random_pairs(generator, pairs, length, leading_pads=0, kind="ragged"):
    """(2·pairs, length) ids, one prompt a pair.

    Kinds: ``ragged`` ends in pads, ``full`` has none, ``identical`` has one pair of equal rows, ``noise`` is anything,
    pads included, anywhere.
    """

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    if kind == "noise":
        return torch.randint(PAD - 1, PAD + 2, (2 * pairs, length), generator=generator)
    ids = torch.randint(PAD + 1, VOCABULARY, (2 * pairs, length), generator=generator)
    ids[:, :leading_pads] = PAD
    for pair in range(pairs):
        prompt = draw(min(max(1, leading_pads), length - 1), length)
        ids[pairs + pair, :prompt] = ids[pair, :prompt]
        if kind != "full":
            for row in (pair, pairs + pair):
                ids[row, draw(prompt, length) + 1 :] = PAD
    if kind == "identical":
        ids[pairs] = ids[0]
    return ids


def text_end(row, leading_pads):
    """The index of pad number ``leading_pads`` (counted from 0) of a list of ids, or the list's length."""
    pads = [position for position, token in enumerate(row) if token == PAD]
    return pads[leading_pads] if len(pads) > leading_pads else len(row)


def pair_cost(chosen, rejected, margin, smoothing):
    gap = chosen - rejected - margin
    probability = 1 / (1 + torch.exp(-gap))
    opposite = 1 / (1 + torch.exp(gap))
    return -(1 - smoothing) * torch.log(probability) - smoothing * torch.log(opposite)


def barrier(score):
    size, knee = abs(score), 4.95
    if size <= knee:
        return -torch.log(5 - size) - torch.log(5 + size)
    at_knee = torch.tensor((5 - knee) * (5 + knee), dtype=torch.float64).log()
    return -at_knee + (1 / (5 - knee) - 1 / (5 + knee)) * (size - knee)


def penalty_cost(kind, chosen, rejected):
    both = chosen + rejected
    if kind in ("center", "centre"):
        return sum((c + r) ** 2 for c, r in zip(chosen, rejected)) / len(chosen)
    if kind == "l2":
        return sum(score**2 for score in both) / len(both)
    if kind == "zero_sum":
        return (sum(both) / len(both)) ** 2
    return sum(barrier(score) for score in both) / len(both)


def slow_forward(
    scores,
    input_ids,
    leading_pads=0,
    margin=0.0,
    label_smoothing=0.0,
    score_penalty=None,
    score_penalty_weight=0.0,
    loss_level="token",
    exclude_pads=False,
):
    """Loss, chosen and rejected end scores from token scores (2b, s): pair by pair, token by token."""
    rows = input_ids.tolist()
    pairs, length = len(rows) // 2, len(rows[0])
    losses, chosen_ends, rejected_ends = [], [], []
    for pair in range(pairs):
        chosen_row, rejected_row = rows[pair], rows[pairs + pair]
        chosen, rejected = scores[pair], scores[pairs + pair]
        ends = text_end(chosen_row, leading_pads), text_end(rejected_row, leading_pads)
        pair_margin = float(margin[pair]) if isinstance(margin, torch.Tensor) else margin

        differing = [i for i in range(length) if chosen_row[i] != rejected_row[i]]
        if exclude_pads:
            span = range(differing[0], min(ends)) if differing else range(0)
        else:
            span = range(differing[0], max(ends)) if differing else range(length - 1, length)
        chosen_ends.append(chosen[ends[0] - 1])
        rejected_ends.append(rejected[ends[1] - 1])
        if loss_level == "token" and len(span):
            costs = [pair_cost(chosen[i], rejected[i], pair_margin, label_smoothing) for i in span]
        else:
            costs = [pair_cost(chosen_ends[-1], rejected_ends[-1], pair_margin, label_smoothing)]
        losses.append(sum(costs) / len(costs))
    loss = sum(losses) / pairs
    if score_penalty is not None:
        loss = loss + score_penalty_weight * penalty_cost(score_penalty, chosen_ends, rejected_ends)
    return loss, torch.stack(chosen_ends), torch.stack(rejected_ends)


def slow_end_scores(values, input_ids, prompt_length):
    """The value before each row's first pad after its prompt, or its last value."""
    ends = []
    for value, row in zip(values, input_ids.tolist()):
        end = prompt_length
        while end < len(row) and row[end] != PAD:
            end += 1
        ends.append(value[end - 1])
    return torch.stack(ends)
