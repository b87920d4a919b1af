# SPDX-License-Identifier: Apache-2.0
"""Drop-in reward model for DeepSpeed-Chat: one score per token from a linear head on a decoder.

Same constructor, calls, attributes and state-dict keys as ``dschat/utils/model/reward_model.py``. With the new keyword
arguments left at their defaults it gives upstream's loss, scores and gradients, without a loop over the batch and
without a host-device synchronization; scores and loss are float32 at least, whatever the model's dtype. Imports torch
only, so that it can be copied into a checkout as one file.

Notation: b pairs, s tokens, h hidden units. A batch holds 2b rows: b chosen, then b rejected.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

LOSS_LEVELS = ("token", "sequence")
SCORE_PENALTIES = ("center", "l2", "zero_sum", "log_barrier", "centre")  # centre: the earlier name of center

BARRIER_WALL = 5.0  # InternLM2: -log(5 - r) - log(5 + r)
BARRIER_KNEE = 0.99 * BARRIER_WALL  # linear from here on: slope 2·4.95 / (25 - 4.95²) = 19.9 instead of infinity


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """float16 and bfloat16 to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def pairwise_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    margin: torch.Tensor | float | None = None,
    label_smoothing: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Bradley-Terry loss, −(1−α)·log σ(Δ − m) − α·log σ(m − Δ) with Δ = chosen − rejected.

    Args:
        chosen, rejected: scores of any one shape, any floating dtype.
        margin: m, a number or a tensor that broadcasts to the scores (Llama 2, arXiv 2307.09288, eq. 2). None: 0.
        label_smoothing: α, the share of flipped labels assumed, in [0, 0.5] (Secrets of RLHF II, arXiv 2401.06080,
            eq. 5; there without a margin). A tensor that broadcasts to the scores: each pair's own, in [0, 1].

    Returns:
        The loss of each pair, the scores' shape, float32 at least. Finite wherever the scores are.

    Margin 0, smoothing 0: plain logistic. Two equal scores then cost log 2, and |gradient| never exceeds 1.
    """
    gap = at_least_float32(chosen) - at_least_float32(rejected)
    if margin is not None:
        gap = gap - margin
    loss = -F.logsigmoid(gap)
    if isinstance(label_smoothing, torch.Tensor) or label_smoothing:
        # log σ(−x) = log σ(x) − x, so the smoothed loss is the plain one plus α·gap
        loss = loss + label_smoothing * gap
    return loss


def log_barrier(scores: torch.Tensor) -> torch.Tensor:
    """−log(5 − r) − log(5 + r) for each score; a straight line of the same slope beyond |r| = 4.95.

    InternLM2 (arXiv 2403.17297) clamps r to ±5 instead, which leaves a score outside without a gradient. Once
    differentiable; smallest at 0, where it is −log 25. Any shape, float32 at least.
    """
    size = at_least_float32(scores).abs()
    inside = size.clamp(max=BARRIER_KNEE)
    slope = 2 * BARRIER_KNEE / (BARRIER_WALL**2 - BARRIER_KNEE**2)
    return -torch.log(BARRIER_WALL - inside) - torch.log(BARRIER_WALL + inside) + slope * (size - inside)


def score_penalty(
    kind: str, chosen: torch.Tensor, rejected: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """A term that keeps scores near zero, to be added to the loss with a weight.

    Args:
        kind: ``center``: mean (r_chosen + r_rejected)² (Eisenstein et al. 2023, arXiv 2312.09244, eq. 2; TRL's
            ``center_rewards_coefficient``, weight 0.01). ``l2``: mean r². ``zero_sum``: (mean of all 2b scores)²
            (batch sum to zero, BSR 2025, weight 1e-3·batch). ``log_barrier``: mean of :func:`log_barrier`
            (weight 0.01).
        chosen, rejected: scores (b,).
        weights: of the pairs in those means (b,), which sum to 1. None: all the same.

    Returns:
        A 0-d tensor, float32 at least. ``zero_sum`` looks at the batch it is given: the micro-batch of one rank.

    Raises:
        ValueError: an unknown kind.
    """
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    if weights is None:
        weights = torch.full_like(chosen, 1 / max(len(chosen), 1))
    if kind in ("center", "centre"):
        return ((chosen + rejected).square() * weights).sum()
    if kind == "l2":
        return ((chosen.square() + rejected.square()) * weights).sum() / 2
    if kind == "zero_sum":
        return ((chosen + rejected) * weights).sum().square() / 4
    if kind == "log_barrier":
        return ((log_barrier(chosen) + log_barrier(rejected)) * weights).sum() / 2
    raise ValueError(f"score penalty {kind!r}: choose one of {', '.join(SCORE_PENALTIES)}")


def span_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    pair_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = pairwise_loss,
) -> torch.Tensor:
    """Mean of a pairwise loss over the tokens of a span, token i of one answer against token i of the other.

    Args:
        chosen, rejected: the score at every token (b, s).
        start, end: the span's first token and the one after its last, (b,) integers.
        pair_loss: two (b, s) → the loss of each of those pairs, (b, s), finite where the scores are.

    Returns:
        (b,), float32 at least; 0 for an empty span. What lies outside a span gets no gradient, even if it is NaN.
    """
    position = torch.arange(chosen.shape[1], device=chosen.device)
    inside = (position >= start[:, None]) & (position < end[:, None])  # (b, s)
    loss = pair_loss(chosen.where(inside, 0.0), rejected.where(inside, 0.0)).where(inside, 0.0)
    return loss.sum(1) / inside.sum(1).clamp(min=1)


def first_true(flags: torch.Tensor) -> torch.Tensor:
    """Index of the first True of each row of (b, s), s if there is none. (b,)"""
    sentinel = flags.new_ones(flags.shape[0], 1)
    return torch.cat([flags, sentinel], dim=1).int().argmax(1)


class ValueHead(nn.Linear):
    """A bias-free linear map to one score, stored in the model's dtype and multiplied in float32 at least.

    A score of 10 in bfloat16 is known to ±0.03 only; the product over h units in float32 keeps what the hidden state
    still holds. (…, h) → (…, 1).
    """

    def __init__(self, width: int, dtype: torch.dtype | None = None):
        super().__init__(width, 1, bias=False)
        self.to(dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else at_least_float32(self.bias)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(at_least_float32(hidden), at_least_float32(self.weight), bias)


def _hidden_width(config) -> int:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    # OPT projects its output to word_embed_proj_dim; the names differ between families
    for name in ("word_embed_proj_dim", "hidden_size", "n_embd"):
        width = getattr(config, name, None)
        if width is not None:
            return width
    raise ValueError(f"{type(config).__name__} names no hidden size (word_embed_proj_dim, hidden_size or n_embd)")


class RewardModel(nn.Module):
    """A decoder with a scalar head, trained on pairs of answers.

    Args:
        base_model: a Transformers model without a head (``AutoModel``), 4.33 to 5.x.
        tokenizer: anything with a ``pad_token_id``; pads decide where a text ends.
        num_padding_at_beginning: pads that belong to every text. OPT's start token counts as one where pad, start and
            end token are the same.
        compute_fp32_loss: kept for its callers. The loss is computed and returned in float32 at least, always.
        margin: m of :func:`pairwise_loss`, for every pair that comes without one.
        label_smoothing: α of :func:`pairwise_loss`.
        score_penalty: one of ``SCORE_PENALTIES``, on the end scores, or None.
        score_penalty_weight: its weight, above 0 where there is a penalty.
        loss_level: ``token``: upstream's, the mean over the tokens from the first difference to the longer answer's
            end, pads of the shorter one included. ``sequence``: the end scores, as in InstructGPT, Llama 2 and TRL.
        exclude_pads: end the token-level span at the shorter answer's end, so that no pad is trained. The rest of the
            longer answer, its last token included, then gets no gradient of its own.

    Raises:
        ValueError: an unknown level or penalty, a penalty without a weight above 0, smoothing outside [0, 0.5], a
            margin that is not finite.
    """

    def __init__(
        self,
        base_model,
        tokenizer,
        num_padding_at_beginning=0,
        compute_fp32_loss=False,
        *,
        margin=0.0,
        label_smoothing=0.0,
        score_penalty=None,
        score_penalty_weight=0.0,
        loss_level="token",
        exclude_pads=False,
    ):
        super().__init__()
        if loss_level not in LOSS_LEVELS:
            raise ValueError(f"loss_level {loss_level!r}: choose one of {', '.join(LOSS_LEVELS)}")
        if score_penalty is not None and score_penalty not in SCORE_PENALTIES:
            raise ValueError(f"score_penalty {score_penalty!r}: choose one of {', '.join(SCORE_PENALTIES)}")
        if not 0.0 <= label_smoothing <= 0.5:
            raise ValueError(f"label_smoothing {label_smoothing}: give a number in [0, 0.5]")
        if not math.isfinite(margin):
            raise ValueError(f"margin {margin}: give a finite number")
        if not 0.0 <= score_penalty_weight < math.inf or (score_penalty is not None and not score_penalty_weight):
            raise ValueError(f"score_penalty_weight {score_penalty_weight}: give a finite number above 0")
        self.config = base_model.config
        self.num_padding_at_beginning = num_padding_at_beginning
        self.compute_fp32_loss = compute_fp32_loss
        self.margin = margin
        self.label_smoothing = label_smoothing
        self.score_penalty = score_penalty
        self.score_penalty_weight = score_penalty_weight
        self.loss_level = loss_level
        self.exclude_pads = exclude_pads

        width = _hidden_width(self.config)
        if not hasattr(self.config, "word_embed_proj_dim"):
            self.config.n_embd = width  # upstream sets it, and its callers read it
        self.v_head = ValueHead(width, dtype=next(base_model.parameters()).dtype)
        self.rwtransformer = base_model
        self.PAD_ID = tokenizer.pad_token_id

        accepted = inspect.signature(base_model.forward).parameters.values()
        self._accepted = {p.name for p in accepted}
        # a wrapper, PEFT's say, names no argument and hands all of them on
        self._accepts_anything = "input_ids" not in self._accepted and any(p.kind is p.VAR_KEYWORD for p in accepted)

    def gradient_checkpointing_enable(self, **kwargs):
        self.rwtransformer.gradient_checkpointing_enable(**kwargs)

    def gradient_checkpointing_disable(self):
        self.rwtransformer.gradient_checkpointing_disable()

    def token_scores(self, input_ids, use_cache=False, **kwargs):
        """The score at every token, (rows, s), float32 at least.

        A keyword goes to the backbone only if it holds something and the backbone's ``forward`` names it: LLaMA never
        had ``head_mask``, Transformers 5 has it nowhere and would lose it among its ``**kwargs``, encoders have no
        ``use_cache``.

        Raises:
            TypeError: a keyword that holds something and that the backbone does not take.
        """
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        unknown = [name for name in kwargs if name not in self._accepted]
        if unknown and not self._accepts_anything:
            raise TypeError(f"{type(self.rwtransformer).__name__} takes no {', '.join(unknown)}")
        if "use_cache" in self._accepted or self._accepts_anything:
            kwargs["use_cache"] = use_cache
        hidden = self.rwtransformer(input_ids, **kwargs)[0]  # (rows, s, h)
        return self.v_head(hidden).squeeze(-1)

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        position_ids=None,
        head_mask=None,
        inputs_embeds=None,
        use_cache=False,
        margin=None,
    ):
        """Loss and end scores of b pairs.

        Args:
            input_ids: (2b, s), b chosen rows then the b rejected of the same prompts, padded on the right.
            attention_mask: (2b, s).
            margin: the pairs' own margins (b,), or one number, in place of the number given at construction.

        Returns:
            ``loss``: 0-d. ``chosen_mean_scores``, ``rejected_mean_scores``: the scores at the answers' last tokens
            (b,), named as upstream names them.

        Raises:
            ValueError: an odd number of rows, or not two dimensions.
        """
        if input_ids.dim() != 2 or input_ids.shape[0] % 2:
            raise ValueError(f"input_ids {tuple(input_ids.shape)}: give (2b, s), b chosen rows then b rejected")
        scores = self.token_scores(
            input_ids,
            use_cache=use_cache,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
        )
        chosen, rejected = scores.chunk(2)  # (b, s)
        start, chosen_end, rejected_end = self._spans(input_ids)
        # a row that begins with its final pad has end 0; upstream then reads the last column, and so does this
        last = input_ids.shape[1] - 1
        chosen_scores = chosen.gather(1, torch.where(chosen_end > 0, chosen_end - 1, last)[:, None]).squeeze(1)
        rejected_scores = rejected.gather(1, torch.where(rejected_end > 0, rejected_end - 1, last)[:, None]).squeeze(1)

        margin = self.margin if margin is None else margin
        if isinstance(margin, torch.Tensor):
            margin = margin.reshape(-1)
        sequence_loss = pairwise_loss(chosen_scores, rejected_scores, margin, self.label_smoothing)
        loss = sequence_loss
        if self.loss_level == "token":
            loss, has_tokens = self._token_loss(chosen, rejected, start, chosen_end, rejected_end, margin)
            # nothing between first difference and end: upstream divides by zero, the end scores still say something
            loss = torch.where(has_tokens, loss, sequence_loss)
        loss = loss.mean()
        if self.score_penalty is not None:
            penalty = score_penalty(self.score_penalty, chosen_scores, rejected_scores)
            loss = loss + self.score_penalty_weight * penalty
        return {"loss": loss, "chosen_mean_scores": chosen_scores, "rejected_mean_scores": rejected_scores}

    def _token_loss(self, chosen, rejected, start, chosen_end, rejected_end, margin):
        """The mean loss over the tokens of each pair from their first difference on, and whether there are any. (b,)

        chosen, rejected: scores (b, s). start, chosen_end, rejected_end: of :meth:`_spans`, (b,).
        """
        last = chosen.shape[1] - 1
        if self.exclude_pads:
            end = torch.minimum(chosen_end, rejected_end)
        else:  # upstream gives a pair of identical rows the last column
            end = torch.where(start > last, last + 1, torch.maximum(chosen_end, rejected_end))
            start = start.clamp(max=last)
        columns = margin[:, None] if isinstance(margin, torch.Tensor) else margin
        loss = span_loss(chosen, rejected, start, end, lambda c, r: pairwise_loss(c, r, columns, self.label_smoothing))
        return loss, end > start

    def _spans(self, input_ids):
        """Where the answers of each pair first differ (s: nowhere), and where the two end. Three times (b,).

        A text ends before its pad number ``num_padding_at_beginning``, counted from 0.
        """
        is_pad = input_ids == self.PAD_ID
        end = first_true(is_pad & (is_pad.cumsum(1) == self.num_padding_at_beginning + 1))
        chosen_end, rejected_end = end.chunk(2)
        chosen_ids, rejected_ids = input_ids.chunk(2)
        start = first_true(chosen_ids != rejected_ids)
        return start, chosen_end, rejected_end

    def forward_value(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        head_mask=None,
        inputs_embeds=None,
        return_value_only=False,
        prompt_length=0,
        use_cache=False,
    ):
        """The score at every token, and at each answer's end: what PPO reads.

        Args:
            input_ids, attention_mask: (b, s). Pads before the prompt, and after the answer.
            return_value_only: give the values alone.
            prompt_length: columns that the padded prompt takes; the answer ends before the first pad after them.

        Returns:
            values (b, s), or ``{"values": (b, s), "chosen_end_scores": (b,)}``.

        Raises:
            ValueError: no prompt length where end scores are asked for.
        """
        values = self.token_scores(
            input_ids,
            use_cache=use_cache,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
        )
        if return_value_only:
            return values
        if prompt_length < 1:
            raise ValueError(f"prompt_length {prompt_length}: the end of an answer is looked for after its prompt")
        end = first_true(input_ids[:, prompt_length:] == self.PAD_ID) + prompt_length
        return {"values": values, "chosen_end_scores": values.gather(1, end[:, None] - 1).squeeze(1)}
