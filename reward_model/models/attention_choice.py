# SPDX-License-Identifier: Apache-2.0
"""Which attention backend a model takes: those that are right, tried out on the model itself, and the fastest of them.

Notation: n responses, h hidden units, t different tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward_model.batching.batch import Batch, Tokens
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.distributed import first_text, largest
from reward_model.common.errors import UserError, first_line
from reward_model.data.comparisons import Comparison
from reward_model.models.attention import (
    SEPARATE,
    SEQUENCE,
    AttentionBackend,
    attend_in_steps,
    is_causal_in,
    seen,
)

# Largest relative difference of one hidden state by two backends: rounding over many layers, not a wrong mask
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LEAK = 1e-5  # the same sums with other numbers behind the mask: these differ by nothing, or by a kernel's order
HALF = (torch.bfloat16, torch.float16)
ROUNDS = 3  # of timing
FURTHER = 2.0  # from float32 than separate rows are, in half precision


MEASURED = "reward_model_measured"  # an attention function's name among Transformers'


class Probe(Protocol):
    """Runs a model on a batch by a backend."""

    def states_of(self, batch: Batch, backend: AttentionBackend, training: bool) -> torch.Tensor:
        """What the head is given of each response, (n, h)."""

    def gradient(self, batch: Batch, backend: AttentionBackend) -> torch.Tensor:
        """Of a sum of these states with fixed weights, by what the embedding gives for each token: (t, h)."""

    def rounding(self, batch: Batch, backend: AttentionBackend) -> list[float]:
        """How far each layer's attention is from float32, given the same queries, keys and values.

        SEPARATE: that of separate rows. Empty: the model does not ask Transformers for its attention function.
        """

    def seconds(self, batches: Sequence[Batch], backend: AttentionBackend) -> float:
        """For the forward and the backward pass of batches."""


@dataclass(frozen=True)
class Texts:
    """Made-up texts to try backends on.

    ids: ordinary tokens, 60 or more. pad: fills rows. window: tokens that some layer looks back on. longest: tokens of
    the longest text that will come.
    """

    ids: Sequence[int]
    pad: int
    window: float = math.inf
    longest: int = 0

    @property
    def slides(self) -> bool:
        """Whether texts will come that are longer than the window."""
        return self.longest > self.window

    def small(self, backend: AttentionBackend, other: bool = False) -> Batch:
        """Two prompts with three and two responses, pairs of segments. ``other``: the first response is another one."""
        ids = list(self.ids)
        first = ids[50:57] if other else ids[9:16]
        comparisons = [
            Comparison(ids[:9], [first, ids[16:28], ids[28:33]], better=[0, 1], worse=[1, 2], margin=[0.0, 0.0]),
            Comparison(ids[33:37], [ids[37:40], ids[40:49]], better=[0], worse=[1], margin=[0.0]),
        ]
        comparisons = [replace(each, two_segments=True) for each in comparisons]
        return collate(comparisons, Layout(backend.layout, self.pad, block=backend.block, multiple=backend.multiple))

    def long(self, backend: AttentionBackend) -> Batch:
        """A pair of which both texts are longer than the window, by as much as they may be."""
        beyond = min(self.longest, int(self.window) + 32)
        ids = (list(self.ids) * -(-beyond // len(self.ids)))[: beyond - 4]
        pair = Comparison(ids, [list(self.ids[:4]), list(self.ids[4:8])], better=[0], worse=[1], margin=[0.0])
        return collate([pair], Layout(backend.layout, self.pad, block=backend.block))


@dataclass
class Choice:
    """What was tried, and what was taken.

    faults: why each of the others is not right. seconds: of those that were timed, for a row of the data.
    """

    backend: AttentionBackend = SEPARATE
    faults: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        notes = [f"not {name}: {fault}" for name, fault in self.faults.items()]
        if self.seconds:
            times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in self.seconds.items())
            notes.insert(0, f"a row of the data takes {times}")
        because = f" ({'; '.join(notes)})" if notes else ""
        if self.backend.attention == SEQUENCE:
            return f"prompts are not shared, {self.backend.multiple} processes share each text"
        if self.backend.shares:
            return f"prompts are shared: {self.backend.name} attention{because}"
        if self.backend is SEPARATE:
            return f"prompts are not shared, each answer has a padded row of its own{because}"
        return f"prompts are not shared, answers are in one row without pads: {self.backend.name} attention{because}"


def choose(
    backends: Sequence[AttentionBackend],
    probe: Probe,
    dtype: torch.dtype,
    texts: Texts,
    batches: Callable[[AttentionBackend], Sequence[Batch]] | None = None,
) -> Choice:
    """The first of some backends by which the model gives what separate rows give, on every rank; else SEPARATE.

    Args:
        dtype: the model's.
        batches: Micro-batches to time the right ones by, SEPARATE among them, and take the fastest; None: the first.
    """
    choice, right = Choice(), []
    for backend in backends:
        found = fault(backend, probe, dtype, texts)
        if found:
            choice.faults[backend.name] = found
        else:
            right.append(backend)
            if batches is None:
                break
    choice.backend = right[0] if right else SEPARATE
    if batches is not None and right:
        choice.backend = _fastest([*right, SEPARATE], probe, batches, choice)
    return choice


def require(backend: AttentionBackend, probe: Probe, dtype: torch.dtype, texts: Texts) -> Choice:
    """The backend that the user wants.

    Raises:
        UserError: by it the model does not give what separate rows give.
    """
    if backend is not SEPARATE and (found := fault(backend, probe, dtype, texts)):
        raise UserError(f"--attention {backend.name}: {found}; leave the flag out, and another is taken")
    return Choice(backend)


def _fastest(backends: list[AttentionBackend], probe: Probe, batches: Callable, choice: Choice) -> AttentionBackend:
    """The backend that is fastest on the slowest rank; the first if all fail. Notes seconds and faults in the choice.

    Each is timed in turn, several times, and its least time counts: other work on the machine adds, and never takes.
    """
    least: dict[AttentionBackend, float] = {}
    made: dict[AttentionBackend, Sequence[Batch]] = {}
    for number in range(ROUNDS + 1):
        for backend in [each for each in backends if each.name not in choice.faults]:
            seconds, failed = 0.0, ""
            try:
                made[backend] = own = made.get(backend) or batches(backend)
                rows = sum(len(batch.points.row_weights) for batch in own)  # a token budget holds more without pads
                seconds = probe.seconds(own, backend) / rows
            except Exception as error:  # out of memory, above all
                failed = first_line(error) or type(error).__name__
            if failed := first_text(failed):
                choice.faults[backend.name] = failed
                least.pop(backend, None)
            elif number:  # the first time compiles, and fills caches
                least[backend] = min(least.get(backend, math.inf), largest(seconds))
    choice.seconds = {backend.name: seconds for backend, seconds in least.items()}
    return min(least, key=lambda backend: least[backend], default=backends[0])


def fault(backend: AttentionBackend, probe: Probe, dtype: torch.dtype, texts: Texts) -> str:
    """Why a backend does not give what separate rows give, on the first rank that finds a reason; empty: it does."""
    return first_text(_fault(backend, probe, dtype, texts))


def _fault(backend: AttentionBackend, probe: Probe, dtype: torch.dtype, texts: Texts) -> str:
    if texts.slides and not backend.slides:
        return f"the longest text, {texts.longest} tokens, is beyond the attention's window"
    tolerance = TOLERANCES[dtype]
    try:
        difference, leak = disagreement(probe, backend, texts)
        disagreement(probe, backend, texts, training=True)  # some models refuse only there, for their dropout
        gradients = gradient_disagreement(probe, backend, texts)  # and some GPUs have no room for the backward pass
        whole = backend.attention != SEQUENCE  # a rank that has a part of the tokens cannot compute the rest anew
        further = rounding_ratio(probe, backend, texts) if dtype in HALF and whole else 0.0
        beyond = window_disagreement(probe, backend, texts) if texts.slides else 0.0
    except Exception as error:  # in whatever manner a model refuses, out of memory among them
        return first_line(error) or type(error).__name__
    if not difference <= tolerance:
        return f"differs by {difference:.1g} from separate rows"
    if not beyond <= tolerance:
        return f"differs by {beyond:.1g} from separate rows where a text is longer than the attention's window"
    if not gradients <= 2 * tolerance:
        return f"gradients differ by {gradients:.1g} from those of separate rows"
    if not further <= FURTHER:
        return f"{further:.1f} times as far from float32 as separate rows are"
    return "" if leak <= LEAK else f"an answer moves another's score by {leak:.1g}"


def disagreement(probe: Probe, backend: AttentionBackend, texts: Texts, training: bool = False) -> tuple[float, float]:
    """How far a backend is from separate rows, on two small comparisons.

    Args:
        probe: runs the model, in training or not.

    Returns:
        The largest relative difference of a hidden state from the one of separate rows, and how far it moves when
        another response, or another comparison in its row, changes (0: no leak).
    """
    separate, together = (probe.states_of(texts.small(each), each, training).double() for each in (SEPARATE, backend))
    changed = probe.states_of(texts.small(backend, other=True), backend, training).double()[1:]
    size = separate.norm(dim=1)
    return float(((together - separate).norm(dim=1) / size).max()), float(
        ((changed - together[1:]).norm(dim=1) / size[1:]).max()
    )


def window_disagreement(probe: Probe, backend: AttentionBackend, texts: Texts) -> float:
    """The same where texts are longer than the attention's window; the largest relative difference."""
    separate, together = (probe.states_of(texts.long(each), each, False).double() for each in (SEPARATE, backend))
    return float(((together - separate).norm(dim=1) / separate.norm(dim=1)).max())


def gradient_disagreement(probe: Probe, backend: AttentionBackend, texts: Texts) -> float:
    """How far the gradients of a backend are from those of separate rows, relative to their size."""
    separate, together = (probe.gradient(texts.small(each), each).double() for each in (SEPARATE, backend))
    return float((together - separate).norm() / separate.norm())


def rounding_ratio(probe: Probe, backend: AttentionBackend, texts: Texts) -> float:
    """How much further from float32 a backend's attention is than that of separate rows, in the worst layer.

    The tolerance for states must bear the rounding of all layers of half precision; this need not. 0: not known.
    """
    separate, together = (probe.rounding(texts.small(each), each) for each in (SEPARATE, backend))
    return max((own / max(theirs, 1e-9) for theirs, own in zip(separate, together)), default=0.0)


class RoundingMeter:
    """An attention function in Transformers' sense: another one, and how far it is from float32 in each layer.

    For backends that leave a model its own, torch's stands in, with a mask of which token sees which.

    errors: of each call, relative to what float32 gives.
    """

    def __init__(self, backend: AttentionBackend, tokens: Tokens):
        self.backend, self.tokens, self.errors = backend, tokens, list[float]()

    def __call__(self, module: torch.nn.Module, query, key, value, attention_mask, **options):
        mask = self._mask(is_causal_in(module, options.get("is_causal")), options.get("sliding_window"))
        exactly: dict[str, Any] = {
            "scale": options.get("scaling"),
            "softcap": options.get("softcap"),
            "sinks": options.get("s_aux"),
        }
        if self.backend.attention is not None:
            function = ALL_ATTENTION_FUNCTIONS[self.backend.attention]
            given = function(module, query, key, value, attention_mask, **options)[0]
        elif exactly["softcap"] is exactly["sinks"] is None:
            given = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask.to(query.dtype), **options)[0]
        else:  # of which that function knows nothing
            given = attend_in_steps(query, key, value, mask.to(query.dtype), **exactly).transpose(1, 2)
        single = [states.float() for states in (query, key, value)]
        if exactly["sinks"] is not None:
            exactly["sinks"] = exactly["sinks"].float()
        exact = attend_in_steps(single[0], single[1], single[2], mask, **exactly).transpose(1, 2)
        is_text = self.tokens.attention_mask.bool()
        self.errors.append(float((given.float() - exact)[is_text].norm() / exact[is_text].norm()))
        return given, None

    def _mask(self, causal: bool, window: int | None) -> torch.Tensor:
        """0 where a token sees another, −inf elsewhere. (b, 1, s, s)"""
        tokens = self.tokens
        sees = seen(tokens) if causal else tokens.begin[:, :, None] == tokens.begin[:, None]
        if window is not None:
            sees = sees & ((tokens.position_ids[:, :, None] - tokens.position_ids[:, None]).abs() < window)
        return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, -math.inf)[:, None]
