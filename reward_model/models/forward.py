# SPDX-License-Identifier: Apache-2.0
"""The one forward pass: a scorer or the engine around it, an attention backend, a batch → scores.

Training, evaluations, the check at the start of a run and scoring with a saved model all go through it.

Notation: n responses, r tokens of the longest, h hidden units.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed.nn.functional import all_reduce
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward_model.batching.batch import Batch
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.distributed import ALONE, SequenceGroup
from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.data.comparisons import Comparison
from reward_model.models import attention, attention_choice
from reward_model.models.attention import SEPARATE, AttentionBackend
from reward_model.models.attention_choice import MEASURED, RoundingMeter, Texts
from reward_model.models.scorer import Scorer, embedding_rows, first_position, head_layer


class ScoringModule(Protocol):
    """A scorer, or DeepSpeed's engine around it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


class ForwardPass:
    """What computes the scores of a batch.

    attention: how texts stand in rows, and what they see; separate rows until another backend is chosen.
    Beside the scores, as of the last call, None where there are none: thresholds, those that an ordinal loss has
    learned; heads, the score by each of several heads, (…, K); anchor, their squared distance from where they began.
    """

    def __init__(
        self,
        module: ScoringModule,
        scorer: Scorer,
        dtype: torch.dtype,
        device: torch.device,
        pad: int,
        most_responses: int = 16,
        sequence: SequenceGroup = ALONE,
    ):
        """
        Args:
            module: the scorer, or the DeepSpeed engine around it.
            dtype: in which it computes.
            pad: id that fills rows.
            most_responses: of a prompt, in one row.
            sequence: the ranks that will share each text; until an attention is chosen, each computes it whole.
        """
        self.module, self.scorer, self.dtype, self.device = module, scorer, dtype, device
        self.pad, self.most_responses, self.sequence = pad, most_responses, sequence
        if sequence.size > 1:
            ALL_ATTENTION_FUNCTIONS.register(attention.SEQUENCE, attention.attention_over_ranks(sequence))
        self.own_attention = scorer.backbone.config._attn_implementation
        self.first_position = first_position(scorer)
        self.attention = SEPARATE
        self.thresholds: torch.Tensor | None = None
        self.heads: torch.Tensor | None = None
        self.anchor: torch.Tensor | None = None

    @property
    def layout(self) -> Layout:
        """Of the batches that the attention wants."""
        return self._layout_of(self.attention)

    def _layout_of(self, backend: AttentionBackend) -> Layout:
        return Layout(backend.layout, self.pad, self.most_responses, backend.block, backend.multiple)

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
        if self.attention.attention == attention.SEQUENCE:
            return self._over_ranks(batch, at, states)
        tokens, options = batch.tokens, {}
        mask = attention.attention_mask(batch, self.attention, self.dtype)
        if self.attention is not SEPARATE:
            options["position_ids"] = tokens.position_ids + self.first_position
            options["texts"] = tokens.spans, tokens.span_lengths
        if self.scorer.takes_segment_ids:
            options["segment_ids"] = tokens.segment_ids()
        return self._keep(self.module(tokens.input_ids, mask, at, states=states, **options))

    def _keep(self, found: Any) -> torch.Tensor:
        """The scores alone; what the module gives beside them is kept."""
        found, extras = found if isinstance(found, tuple) else (found, {})
        self.thresholds, self.heads, self.anchor = (extras.get(name) for name in ("thresholds", "heads", "anchor"))
        return found

    def _over_ranks(self, batch: Batch, at: torch.Tensor, states: bool) -> torch.Tensor:
        """The same where each rank has a part of every row: what it has of ``at`` reaches all."""
        tokens, (rank, size) = batch.tokens, (self.sequence.rank, self.sequence.size)
        width = tokens.input_ids.shape[1]
        part = width // size
        here = slice(rank * part, (rank + 1) * part)
        ids, positions = tokens.input_ids[:, here].contiguous(), tokens.position_ids[:, here].contiguous()
        row, column = at // width, at % width
        no_mask = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=ids.device)  # Transformers would make one of a part
        found = self._keep(self.module(ids, no_mask, row * part + column % part, position_ids=positions, states=states))
        is_elsewhere = column // part != rank
        if self.heads is not None:
            self.heads = all_reduce(self.heads.masked_fill(is_elsewhere.unsqueeze(-1), 0), group=self.sequence.group)
            return self.heads.mean(-1)
        found = found.masked_fill(is_elsewhere.unsqueeze(-1) if states else is_elsewhere, 0)
        return all_reduce(found, group=self.sequence.group)

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
        if apart > 10 * attention_choice.TOLERANCES[self.dtype] * together.abs().max().item():
            logger.warning(f"{name}: pads change a score by {apart:.1g}, so that it depends on the rest of its batch")

    def _scores_of(self, rows: list[Comparison]) -> torch.Tensor:
        batch = collate(rows, self.layout).to(self.device)
        return self(batch, batch.tokens.ends).float()

    @torch.no_grad()
    def choose_attention(
        self, longest: int, wanted: str = "auto", batches: Callable[[Layout], Sequence[Batch]] | None = None
    ) -> str:
        """Take the attention backend that is wanted, or the best of those that are right; all ranks take the same.

        Args:
            longest: tokens of the longest text that will come.
            wanted: a backend's name; ``timed``, the fastest of those that are right; or ``auto``, the same on a GPU,
                and on a CPU the first that is right.
            batches: micro-batches of a layout, to time backends by.

        Returns:
            A line that says which, and why.

        Raises:
            UserError: the wanted one is not there, or not right for this model.
        """
        if self.sequence.size > 1:
            return self._share_texts(longest, wanted)
        on_gpu = self.device.type == "cuda"
        every = (*(attention.ON_CUDA if on_gpu else attention.ON_CPU), SEPARATE)
        is_open = wanted in ("auto", "timed")
        backends = [each for each in every if is_open or each.name == wanted]
        if self.scorer.pooling != "last":  # only a decoder that is scored at the last token can share prompts
            backends = [each for each in backends if not each.shares]
            if not backends:
                raise UserError(f"--attention {wanted}: this model is scored at more than the last token; take varlen")
        texts = self._texts(longest)
        with torch.random.fork_rng([self.device] if on_gpu else []):
            if is_open:
                timed = batches if on_gpu or wanted == "timed" else None
                choice = attention_choice.choose(backends[:-1], self, self.dtype, texts, self._made_by(timed))
            else:
                choice = attention_choice.require(backends[0], self, self.dtype, texts)
        self.use(choice.backend)
        return str(choice)

    def _made_by(self, batches: Callable[[Layout], Sequence[Batch]] | None):
        """The same by a backend."""
        if batches is None:
            return None
        return lambda each: batches(self._layout_of(each))

    def _texts(self, longest: int) -> Texts:
        """Made up, of tokens that are no pads."""
        ids = np.random.default_rng(0).integers(embedding_rows(self.scorer), size=90)
        ids = ids[(ids != self.pad) & (ids != self.first_position - 1)][:60].tolist()  # RoBERTa counts no pads
        return Texts(ids, self.pad, attention.window(self.scorer.config), longest)

    def _share_texts(self, longest: int, wanted: str) -> str:
        """Take the attention by which ranks share texts; the line that says so."""
        size = self.sequence.size
        flag = f"--sequence_parallel_size {size}"
        if wanted != "auto":
            raise UserError(f"{flag} has an attention of its own: leave --attention out")
        if self.scorer.pooling != "last":
            raise UserError(f"{flag}: only a decoder that is scored at the last token can share a text")
        backend = AttentionBackend("sequence", SEPARATE.layout, attention.SEQUENCE, multiple=size)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            fault = attention_choice.fault(backend, self, self.dtype, self._texts(longest))
        if fault:
            raise UserError(f"{flag}: {fault}")
        self.use(backend)
        return str(attention_choice.Choice(backend))

    def states(self, batch: Batch, backend: AttentionBackend, training: bool) -> torch.Tensor:
        """What the head is given of each response, (n, h), by a backend."""
        self.use(backend)
        self.module.train(training)
        return self._given_to_the_head(batch.to(self.device))

    def _given_to_the_head(self, batch: Batch) -> torch.Tensor:
        if self.scorer.pooling == "last":
            return self(batch, batch.tokens.ends, states=True)
        caught: list[torch.Tensor] = []
        hook = head_layer(self.scorer).register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        try:
            self(batch, batch.tokens.ends)
        finally:
            hook.remove()
        return caught[-1]

    @contextmanager
    def _through_the_scorer(self, given: list[torch.Tensor]) -> Iterator[None]:
        """Without the engine, which allows no backward pass but its own; the embedding's outputs are leaves, kept."""

        def catch(module, inputs, output: torch.Tensor) -> torch.Tensor:
            given.append(output.detach().requires_grad_())
            return given[-1]

        hook = self.scorer.backbone.get_input_embeddings().register_forward_hook(catch)
        engine, self.module = self.module, self.scorer
        try:
            yield
        finally:
            hook.remove()
            self.module = engine

    @torch.enable_grad()
    def gradient(self, batch: Batch, backend: AttentionBackend) -> torch.Tensor:
        """Of a sum of the states at the ends, with fixed weights: by what the embedding gives for each token, (t, h).

        A token that stands at several places has the sum of their gradients, however many rows repeat it. No weight
        gets a gradient, so that nothing of DeepSpeed's takes this for a step.
        """
        given: list[torch.Tensor] = []
        self.use(backend)
        batch = batch.to(self.device)
        with self._through_the_scorer(given):
            self.module.eval()
            found = self._given_to_the_head(batch)
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        (gradient,) = torch.autograd.grad((found.float() * weights).sum(), given)
        if backend.attention == attention.SEQUENCE:  # each rank has that of its tokens, from the losses of all
            parts = [torch.empty_like(gradient) for _ in range(self.sequence.size)]
            torch.distributed.all_gather(parts, gradient.contiguous(), group=self.sequence.group)
            gradient = torch.cat(parts, dim=1) / self.sequence.size
        is_text = batch.tokens.attention_mask.bool()
        tokens, place = torch.unique(batch.tokens.input_ids[is_text], return_inverse=True)
        return gradient.new_zeros(len(tokens), gradient.shape[-1], dtype=torch.float32).index_add_(
            0, place, gradient[is_text].float()
        )

    def rounding(self, batch: Batch, backend: AttentionBackend) -> list[float]:
        """How far each layer's attention is from float32, given the same queries, keys and values."""
        batch = batch.to(self.device)
        meter = RoundingMeter(backend, batch.tokens)
        ALL_ATTENTION_FUNCTIONS.register(MEASURED, meter)
        # Transformers makes no mask for a function of ours; the meter has its own for separate rows
        self.use(AttentionBackend("dense", SEPARATE.layout) if backend is SEPARATE else backend)
        self.scorer.backbone.set_attn_implementation(MEASURED)
        self.module.eval()
        self._given_to_the_head(batch)
        return meter.errors

    @torch.enable_grad()
    def seconds(self, batches: Sequence[Batch], backend: AttentionBackend) -> float:
        """For the forward and the backward pass of batches, as in training.

        The gradients of weights are not computed, as DeepSpeed would take them for a step's; where weights train, they
        are taken to cost as much as the forward pass, whose products theirs are as large as. Nor can activations be
        recomputed by reentrant calls, which ZeRO 3 needs, for a gradient by some tensors alone: the forward pass counts
        once more for them, too.
        """
        given: list[torch.Tensor] = []
        self.use(backend)
        recomputes = self.recomputes_reentrantly
        forward = backward = 0.0
        with self._through_the_scorer(given):
            self.module.train(not recomputes)  # models recompute in training only
            for batch in batches:
                begun = self._now()
                batch = batch.to(self.device)
                total = self(batch, batch.tokens.ends).float().sum()
                computed = self._now()
                torch.autograd.grad(total, given)
                given.clear()
                forward += computed - begun
                backward += self._now() - computed
        trains = next(self.scorer.backbone.parameters()).requires_grad
        return (1 + trains + recomputes) * forward + backward

    @property
    def recomputes_reentrantly(self) -> bool:
        """Whether activations are recomputed by reentrant calls."""
        functions = (getattr(module, "_gradient_checkpointing_func", None) for module in self.scorer.modules())
        keywords = (getattr(inspect.unwrap(function), "keywords", {}) for function in functions if function is not None)
        return any(each.get("use_reentrant") for each in keywords)

    def _now(self) -> float:
        """Seconds of a clock, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
