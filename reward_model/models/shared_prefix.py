# SPDX-License-Identifier: Apache-2.0
"""Attention for responses that share a prompt in one row: each sees the prompt and itself.

Three backends give a model that attention, each through what it takes as its 4-D attention mask; which of them a model
takes, if any, is tried out on the model itself.

- ``slices``: all comparisons in one row, one product of queries and keys per segment. No pads, no mask of s² numbers.
- ``flex``: all comparisons in one row, FlexAttention with a block mask (CUDA: it has no backward pass on a CPU).
- ``dense``: a comparison in a row, and a mask (b, 1, s, s) in the model's dtype.

Notation: b rows, s tokens, d units of an attention head, n responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward_model.batching.batch import Batch, Tokens
from reward_model.batching.collate import collate
from reward_model.batching.layout import Layout
from reward_model.common.distributed import first_text
from reward_model.common.errors import first_line
from reward_model.data.comparisons import Comparison

SLICES = "reward_model_slices"  # its name among Transformers' attention functions
BLOCK = 128  # FlexAttention's blocks; rows of a multiple of it also mean fewer shapes to compile for

# Largest relative difference of one hidden state by two backends: rounding over many layers, not a wrong mask
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LEAK = 1e-5  # the same sums with other numbers behind the mask: these differ by nothing, or by a kernel's order


@dataclass(frozen=True)
class AttentionBackend:
    """One of the backends above, or separate rows.

    name: as in the head of this file. layout: of the batches that it wants. attention: the name under which
    Transformers knows its attention function; None: the one that the model came with.
    """

    name: str
    layout: str
    attention: str | None = None
    multiple: int = 1


SEPARATE = AttentionBackend("separate", "separate")
DENSE = AttentionBackend("dense", "shared")
ON_CPU = (AttentionBackend("slices", "packed", SLICES), DENSE)
ON_CUDA = (AttentionBackend("flex", "packed", "flex_attention", multiple=BLOCK), DENSE)


def attention_mask(tokens: Tokens, backend: AttentionBackend, dtype: torch.dtype) -> torch.Tensor:
    """What the model is given as its attention mask.

    Returns:
        For separate rows, ones and zeros of shape (b, s). For ``slices``, ``Tokens.sizes`` in shape (1, 1, 1, m). For
        ``flex``, a BlockMask. For ``dense``, a tensor of ``dtype`` and shape (b, 1, s, s), 0 where a token sees another
        and −inf elsewhere.
    """
    if backend.name == "separate":
        return tokens.attention_mask
    if backend.name == "slices":
        return tokens.sizes[None, None, None]
    if backend.name == "flex":
        return _block_mask(tokens)
    rows, size = tokens.input_ids.shape
    row, index = (torch.arange(n, device=tokens.input_ids.device) for n in (rows, size))
    sees = _visibility(tokens.comparison, tokens.response)(row[:, None, None], None, index[:, None], index)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, -math.inf)[:, None]


def _visibility(comparison: torch.Tensor, response: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Whether a query sees a key: an earlier token, or itself, of the prompt or of its own response."""

    def sees(row, head, query, key):
        same = comparison[row, query] == comparison[row, key]
        shared = (response[row, key] == 0) | (response[row, query] == response[row, key])
        return (query >= key) & same & shared

    return sees


def _block_mask(tokens: Tokens):
    from torch.nn.attention.flex_attention import create_block_mask

    rows, size = tokens.input_ids.shape
    sees, device = _visibility(tokens.comparison, tokens.response), tokens.input_ids.device
    # compiled, it never holds all s² answers
    return create_block_mask(
        sees, B=rows, H=None, Q_LEN=size, KV_LEN=size, device=device, _compile=device.type == "cuda"
    )


def sliced_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others,
) -> tuple[torch.Tensor, None]:
    """An attention function in Transformers' sense: each segment of a packed row against what it sees.

    Args:
        query: (1, heads, s, d); key, value: as many or fewer heads, of which each serves as many queries.
        attention_mask: :attr:`Tokens.sizes`, (1, 1, 1, m).

    Raises:
        NotImplementedError: a model that changes the products in a way that this function does not know.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"{unknown[0]} in the attention of {type(module).__name__}")
    comparisons = _segments(attention_mask.flatten().tolist())
    lengths = [length for segments in comparisons for length in segments]
    queries, keys, values = (iter(states.split(lengths, dim=2)) for states in (query, key, value))
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": key.shape[1] != query.shape[1]}
    outputs = []
    for prompt, *responses in comparisons:
        prompt_query, prompt_key, prompt_value = next(queries), next(keys), next(values)
        if prompt:
            attended = F.scaled_dot_product_attention(prompt_query, prompt_key, prompt_value, is_causal=True, **options)
            outputs.append(attended)
        for length in responses:
            seen_key = torch.cat([prompt_key, next(keys)], dim=2)
            seen_value = torch.cat([prompt_value, next(values)], dim=2)
            mask = _lower_right(length, prompt + length, query.dtype)
            outputs.append(
                F.scaled_dot_product_attention(next(queries), seen_key, seen_value, attn_mask=mask, **options)
            )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(SLICES, sliced_attention)


def _segments(sizes: list[int]) -> list[list[int]]:
    """[K, prompt, K responses, K, …] → [[prompt, response, …], …]"""
    found, at = [], 0
    while at < len(sizes):
        found.append(sizes[at + 1 : at + 2 + sizes[at]])
        at += 2 + sizes[at]
    return found


def _lower_right(queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query sees a key, −inf elsewhere; the last query sees all. (queries, keys)"""
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill(hidden, -math.inf)


def window(config: PretrainedConfig) -> float:
    """Tokens that a layer of the model looks back on at most; a mask of ours would take that limit away."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    limits = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    used = [name for kind, name in limits.items() if kinds is None or kind in kinds]
    return min([getattr(config, name, None) or math.inf for name in used], default=math.inf)


class Probe(Protocol):
    """Runs a model on a small batch by a backend."""

    def states(self, batch: Batch, backend: AttentionBackend, training: bool) -> torch.Tensor:
        """The hidden state at each response's end, (n, h)."""

    def gradient(self, batch: Batch, backend: AttentionBackend) -> torch.Tensor:
        """Of a sum of these states with fixed weights, by what the embedding gives for each token: (tokens, h)."""


def choose(
    backends: Sequence[AttentionBackend], probe: Probe, dtype: torch.dtype, ids: Sequence[int], pad: int
) -> tuple[AttentionBackend, str]:
    """The first of some backends by which the model gives what separate rows give, on every rank; else SEPARATE.

    Args:
        probe, ids, pad: of :func:`disagreement`. dtype: the model's.

    Returns:
        The backend, and a line that says which, and why none of those before it.
    """
    faults: list[str] = []
    for backend in backends:
        fault = first_text(_fault(backend, probe, TOLERANCES[dtype], ids, pad))
        if not fault:
            because = f"; not {', not '.join(faults)}" if faults else ""
            return backend, f"prompts are shared ({backend.name} attention{because})"
        faults.append(f"{backend.name}: {fault}")
    return SEPARATE, f"prompts are not shared, each answer has a row of its own ({'; '.join(faults)})"


def _fault(backend: AttentionBackend, probe: Probe, tolerance: float, ids: Sequence[int], pad: int) -> str:
    try:
        difference, leak = disagreement(probe, backend, ids, pad)
        disagreement(probe, backend, ids, pad, training=True)  # some models refuse only there, for their dropout
        gradients = gradient_disagreement(probe, backend, ids, pad)  # and some GPUs have no room for the backward pass
    except Exception as error:  # in whatever manner a model refuses, out of memory among them
        return first_line(error) or type(error).__name__
    if not difference <= tolerance:
        return f"differs by {difference:.1g} from separate rows"
    if not gradients <= 2 * tolerance:
        return f"gradients differ by {gradients:.1g} from those of separate rows"
    return "" if leak <= LEAK else f"an answer moves another's score by {leak:.1g}"


def _small_comparisons(ids: list[int], first: list[int]) -> list[Comparison]:
    return [
        Comparison(ids[:9], [first, ids[16:28], ids[28:33]], better=[0, 1], worse=[1, 2], margin=[0.0, 0.0]),
        Comparison(ids[33:37], [ids[37:40], ids[40:49]], better=[0], worse=[1], margin=[0.0]),
    ]


def _small_batch(ids: list[int], first: list[int], backend: AttentionBackend, pad: int) -> Batch:
    layout = Layout(backend.layout, pad, multiple=backend.multiple)
    return collate(_small_comparisons(ids, first), layout)


def disagreement(
    probe: Probe, backend: AttentionBackend, ids: Sequence[int], pad: int, training: bool = False
) -> tuple[float, float]:
    """How far a backend is from separate rows, on two small comparisons.

    Args:
        probe: runs the model, in training or not.
        ids: ordinary tokens, 60 or more, to make texts of.

    Returns:
        The largest relative difference of a hidden state from the one of separate rows, and how far it moves when
        another response, or another comparison in its row, changes (0: no leak).
    """
    ids = list(ids)

    def states(first: list[int], chosen: AttentionBackend) -> torch.Tensor:
        return probe.states(_small_batch(ids, first, chosen, pad), chosen, training).double()

    separate, together = states(ids[9:16], SEPARATE), states(ids[9:16], backend)
    changed = states(ids[50:57], backend)[1:]  # all but the response that is another one now
    size = separate.norm(dim=1)
    return float(((together - separate).norm(dim=1) / size).max()), float(
        ((changed - together[1:]).norm(dim=1) / size[1:]).max()
    )


def gradient_disagreement(probe: Probe, backend: AttentionBackend, ids: Sequence[int], pad: int) -> float:
    """How far the gradients of a backend are from those of separate rows, relative to their size.

    Args:
        probe, ids: of :func:`disagreement`.
    """
    ids = list(ids)
    separate, together = (
        probe.gradient(_small_batch(ids, ids[9:16], chosen, pad), chosen).double() for chosen in (SEPARATE, backend)
    )
    return float((together - separate).norm() / separate.norm())
