# SPDX-License-Identifier: Apache-2.0
"""The one forward pass: a scorer or the engine around it, an attention backend, a batch → scores.

Training, evaluations, the check at the start of a run and scoring with a saved model all go through it.

Notation: n responses, r tokens of the longest, h hidden units.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from reward_model.batching.batch import Batch
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.data.comparisons import Comparison
from reward_model.models import shared_prefix
from reward_model.models.scorer import Scorer, embedding_rows
from reward_model.models.shared_prefix import SEPARATE, AttentionBackend


class ScoringModule(Protocol):
    """A scorer, or DeepSpeed's engine around it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


class ForwardPass:
    """What computes the scores of a batch.

    attention: how responses share their prompt; separate rows until another backend is chosen.
    thresholds: those that an ordinal loss has learned, as of the last call; None: there are none.
    """

    def __init__(
        self,
        module: ScoringModule,
        scorer: Scorer,
        dtype: torch.dtype,
        device: torch.device,
        pad: int,
        most_responses: int = 16,
    ):
        """
        Args:
            module: the scorer, or the DeepSpeed engine around it.
            dtype: in which it computes.
            pad: id that fills rows.
            most_responses: of a prompt, in one row.
        """
        self.module, self.scorer, self.dtype, self.device = module, scorer, dtype, device
        self.pad, self.most_responses = pad, most_responses
        self.own_attention = scorer.backbone.config._attn_implementation
        self.attention = SEPARATE
        self.thresholds: torch.Tensor | None = None

    @property
    def layout(self) -> Layout:
        """Of the batches that the attention wants."""
        return Layout(self.attention.layout, self.pad, self.most_responses, self.attention.multiple)

    def use(self, attention: AttentionBackend) -> None:
        """Take another attention from now on; what is saved should name none of ours, hence SEPARATE before that."""
        self.attention = attention
        self.scorer.backbone.set_attn_implementation(attention.attention or self.own_attention)

    def __call__(self, batch: Batch, at: torch.Tensor, states: bool = False) -> torch.Tensor:
        """Scores at tokens of a batch, a float32 tensor of the shape of ``at``.

        Args:
            batch: A batch on this device.
            at: Indices of tokens, such as ``batch.tokens.ends``, shape (n,), or ``batch.tokens.spans``, shape (n, r).
            states: Whether to return the hidden states instead, which have one more dimension h.
        """
        shared = self.attention is not SEPARATE
        tokens = batch.tokens
        mask = shared_prefix.attention_mask(tokens, self.attention, self.dtype)
        positions = tokens.position_ids if shared else None
        found = self.module(tokens.input_ids, mask, at, position_ids=positions, states=states)
        if isinstance(found, tuple):
            found, self.thresholds = found
        return found

    @torch.no_grad()
    def require_scores(self, end: int) -> None:
        """Score two short texts, together and alone, and say it if pads change a score; all ranks call it.

        Args:
            end: id that ends a text.

        Raises:
            UserError: the model cannot score a text.
        """
        name = type(self.scorer.backbone).__name__
        self.module.eval()
        try:
            ids = np.random.default_rng(0).integers(embedding_rows(self.scorer), size=12).tolist()
            texts = [Comparison([], [[*part, end]]) for part in (ids[:4], ids[4:])]
            together, *alone = (self._scores_of(rows) for rows in (texts, texts[:1], texts[1:]))
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except Exception as error:  # in whatever manner a model that is not made for this refuses
            raise UserError(f"{name} cannot score a text: {first_line(error)}") from error
        apart = (together - torch.cat(alone)).abs().max().item()
        if apart > 10 * shared_prefix.TOLERANCES[self.dtype] * together.abs().max().item():
            logger.warning(f"{name}: pads change a score by {apart:.1g}, so that it depends on the rest of its batch")

    def _scores_of(self, rows: list[Comparison]) -> torch.Tensor:
        batch = collate(rows, self.layout).to(self.device)
        return self(batch, batch.tokens.ends).float()

    @torch.no_grad()
    def choose_attention(self, longest: int) -> str:
        """Take the fastest attention backend by which this model shares prompts rightly; all ranks take the same.

        Args:
            longest: tokens of the longest text that will come.

        Returns:
            A line that says which, and why.
        """
        on_gpu, chosen = self.device.type == "cuda", SEPARATE
        if self.scorer.pooling != "last":
            said = "prompts are not shared: only a decoder that is scored at the last token can do that"
        elif longest > shared_prefix.window(self.scorer.config):
            said = f"prompts are not shared: the longest text, {longest} tokens, is beyond the attention's window"
        else:
            backends = shared_prefix.ON_CUDA if on_gpu else shared_prefix.ON_CPU
            ids = np.random.default_rng(0).integers(embedding_rows(self.scorer), size=60).tolist()
            with torch.random.fork_rng([self.device] if on_gpu else []):
                chosen, said = shared_prefix.choose(backends, self, self.dtype, ids, self.pad)
        self.use(chosen)
        return said

    def states(self, batch: Batch, backend: AttentionBackend, training: bool) -> torch.Tensor:
        """The hidden state at each response's end, (n, h), by a backend."""
        self.use(backend)
        self.module.train(training)
        batch = batch.to(self.device)
        return self(batch, batch.tokens.ends, states=True)

    @torch.enable_grad()
    def gradient(self, batch: Batch, backend: AttentionBackend) -> torch.Tensor:
        """Of a sum of the states at the ends, with fixed weights: by what the embedding gives for each token, (t, h).

        A token that stands at several places has the sum of their gradients, however many rows repeat it. No weight
        gets a gradient, so that nothing of DeepSpeed's takes this for a step.
        """
        given: list[torch.Tensor] = []

        def catch(module, inputs, output: torch.Tensor) -> torch.Tensor:
            given.append(output.detach().requires_grad_())
            return given[-1]

        self.use(backend)
        batch = batch.to(self.device)
        hook = self.scorer.backbone.get_input_embeddings().register_forward_hook(catch)
        engine, self.module = self.module, self.scorer  # the engine allows no backward pass but its own
        self.module.eval()
        try:
            found = self(batch, batch.tokens.ends, states=True)
        finally:
            hook.remove()
            self.module = engine
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        (gradient,) = torch.autograd.grad((found.float() * weights).sum(), given)
        is_text = batch.tokens.attention_mask.bool()
        tokens, place = torch.unique(batch.tokens.input_ids[is_text], return_inverse=True)
        return gradient.new_zeros(len(tokens), gradient.shape[-1], dtype=torch.float32).index_add_(
            0, place, gradient[is_text].float()
        )
