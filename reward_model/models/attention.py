# SPDX-License-Identifier: Apache-2.0
"""Attention for texts in one row: each response sees the prompt that it shares and itself, each text itself alone.

Backends give a model that attention, each through what it takes as its 4-D attention mask, and through an attention
function that Transformers knows by name. :mod:`reward_model.models.attention_choice` tries out which a model takes.

- ``slices``: all comparisons in one row, one product of queries and keys per segment. No pads, no mask of s² numbers.
- ``flex``: all comparisons in one row, FlexAttention with a block mask (CUDA: it has no backward pass on a CPU).
- ``dense``: a comparison in a row, and a mask (b, 1, s, s) in the model's dtype.
- ``varlen``: no prompt is shared, all texts are in one row; FlashAttention's kernel for texts of various lengths on
  CUDA, a product per text on a CPU. Also for encoders.
- ``separate``: no prompt is shared, each text has a padded row; the model's own attention.
- ``sequence``: the same, with the tokens of each row divided among ranks, by DeepSpeed's Ulysses.

Notation: b rows, s tokens, d units of an attention head, n responses.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward_model.batching.batch import Batch, Tokens
from reward_model.common.distributed import SequenceGroup

# their names among Transformers' attention functions
SLICES, FLEX, VARLEN = "reward_model_slices", "reward_model_flex", "reward_model_varlen"
SEQUENCE = "reward_model_sequence"
BLOCK = 128  # FlexAttention's blocks; rows of a multiple of it also mean fewer shapes to compile for


@dataclass(frozen=True)
class AttentionBackend:
    """One of the backends above.

    name: as in the head of this file. layout: of the batches that it wants. attention: the name under which
    Transformers knows its attention function; None: the one that the model came with. block, multiple: of the layout.
    slides: whether it keeps to a layer's sliding window, which a mask of ours takes away.
    """

    name: str
    layout: str
    attention: str | None = None
    block: int = 1
    multiple: int = 1
    slides: bool = False

    @property
    def shares(self) -> bool:
        """Whether responses share their prompt."""
        return self.layout in ("packed", "shared")


SEPARATE = AttentionBackend("separate", "separate", slides=True)
DENSE = AttentionBackend("dense", "shared")
ON_CPU = (
    AttentionBackend("slices", "packed", SLICES, slides=True),
    DENSE,
    AttentionBackend("varlen", "unpadded", SLICES, slides=True),
)
ON_CUDA = (
    AttentionBackend("flex", "packed", FLEX, block=BLOCK),
    AttentionBackend("varlen", "unpadded", VARLEN, slides=True),
    DENSE,
)


def attention_mask(batch: Batch, backend: AttentionBackend, dtype: torch.dtype) -> Any:
    """What the model is given as its attention mask.

    Returns:
        For ``separate``, ones and zeros of shape (b, s). For ``slices``, and for ``varlen`` on a CPU, ``Tokens.sizes``
        in shape (1, 1, 1, m). For ``flex``, a BlockMask. For ``varlen`` on CUDA, where each text begins and the last
        one ends, int32, in shape (1, 1, r, n + 1), of which r is the length of the longest. For ``dense``, a tensor of
        ``dtype`` and shape (b, 1, s, s), 0 where a token sees another and −inf elsewhere.
    """
    tokens = batch.tokens
    if backend.attention == SLICES:
        return tokens.sizes[None, None, None]
    if backend.attention == VARLEN:
        begins = F.pad(tokens.span_lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return begins.expand(1, 1, tokens.spans.shape[1], -1)
    if backend.attention == FLEX:
        return block_mask(batch)
    return tokens.attention_mask if backend.name == "separate" else dense_mask(tokens, dtype)


def visibility(tokens: Tokens) -> Callable[..., torch.Tensor]:
    """Whether a query sees a key, given the indices (row, head, query, key) as FlexAttention gives them."""
    begin, prompt_begin, prompt_end = tokens.begin, tokens.prompt_begin, tokens.prompt_end

    def sees(row, head, query, key):
        of_prompt = (key >= prompt_begin[row, query]) & (key < prompt_end[row, query])
        return (key <= query) & ((key >= begin[row, query]) | of_prompt)

    return sees


def seen(tokens: Tokens) -> torch.Tensor:
    """Whether a token, the second dimension, sees another, the third. (b, s, s)"""
    rows, size = tokens.input_ids.shape
    row, index = (torch.arange(n, device=tokens.input_ids.device) for n in (rows, size))
    return visibility(tokens)(row[:, None, None], None, index[:, None], index)


def dense_mask(tokens: Tokens, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token sees another, −inf elsewhere. (b, 1, s, s)"""
    sees = seen(tokens)
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, -math.inf)[:, None]


def block_mask(batch: Batch):
    """FlexAttention's mask, from the blocks that were counted when the batch was made: no kernel looks at s² pairs."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks, size = batch.blocks, batch.tokens.input_ids.shape[1]
    mask = BlockMask.from_kv_blocks(
        blocks.part_number,
        blocks.part,
        blocks.whole_number,
        blocks.whole,
        BLOCK_SIZE=BLOCK,
        mask_mod=visibility(batch.tokens),
        seq_lengths=(size, size),
    )
    mask.ndim = 4  # GPT-2 and its kin ask, as of a tensor
    return mask


def is_causal_in(module: torch.nn.Module, told: bool | None) -> bool:
    """Whether a layer looks back only.

    What it is told comes second: some are told that they do not, since a mask of theirs says it already.
    """
    return getattr(module, "is_causal", True if told is None else told)


def require_known(module: torch.nn.Module, given: dict[str, Any], unknown: tuple[str, ...]) -> None:
    """Raise NotImplementedError for a model that changes the products in a way that an attention function ignores."""
    for name in unknown:
        if given.get(name) is not None:
            raise NotImplementedError(f"{name} in the attention of {type(module).__name__}")


def sliced_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """An attention function in Transformers' sense: each segment of a row against what it sees.

    Args:
        query: (1, heads, s, d); key, value: as many or fewer heads, of which each serves as many queries.
        attention_mask: :attr:`Tokens.sizes`, (1, 1, 1, m).
        sliding_window: tokens that a query sees at most, itself among them; in an encoder, on each side.
        softcap: products are kept within it, by tanh. s_aux: a further product of each head, which takes a share.

    Raises:
        NotImplementedError: a model that changes the products in a way that this function does not know.
    """
    require_known(module, others, ("position_bias",))
    causal = is_causal_in(module, is_causal)
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    attend: Callable[..., torch.Tensor]
    if softcap is None and s_aux is None:
        attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=key.shape[1] != query.shape[1], **options)
    else:
        attend = functools.partial(attend_in_steps, softcap=softcap, sinks=s_aux, **options)

    def of(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        has_window = sliding_window is not None and sliding_window < keys.shape[2]
        if not has_window and (not causal or queries.shape[2] == keys.shape[2]):
            return attend(queries, keys, values, is_causal=causal)
        window = sliding_window if has_window else None
        mask = _band(queries.shape[2], keys.shape[2], causal, window, query.dtype)
        return attend(queries, keys, values, attn_mask=mask)

    comparisons = list(_segments(attention_mask.flatten().tolist()))
    lengths = [length for segments in comparisons for length in segments]
    parts = [iter(states.split(lengths, dim=2)) for states in (query, key, value)]
    outputs = []
    for prompt, *responses in comparisons:
        own = [next(part) for part in parts]
        if prompt:
            outputs.append(of(*own))
        for _ in responses:
            queries, keys, values = (next(part) for part in parts)
            if prompt:
                keys, values = torch.cat([own[1], keys], dim=2), torch.cat([own[2], values], dim=2)
            outputs.append(of(queries, keys, values))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _segments(sizes: list[int]) -> Iterator[list[int]]:
    """[K, prompt, K responses, K, …] → [prompt, response, …], …"""
    at = 0
    while at < len(sizes):
        yield sizes[at + 1 : at + 2 + sizes[at]]
        at += 2 + sizes[at]


def _band(queries: int, keys: int, causal: bool, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query sees a key, −inf elsewhere; the last query is the last key. (queries, keys)"""
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    ones, shift = torch.ones_like(hidden), keys - queries
    if causal:
        hidden |= ones.triu(shift + 1)
    elif window is not None:
        hidden |= ones.triu(shift + window)
    if window is not None:
        hidden |= ones.tril(shift - window)
    return torch.zeros(queries, keys, dtype=dtype).masked_fill(hidden, -math.inf)


def attend_in_steps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` with a cap on the products, and a sink for each head: (heads,) products."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    products = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    if is_causal:
        attn_mask = _band(query.shape[2], key.shape[2], True, None, query.dtype)
    if attn_mask is not None:
        products = products + attn_mask
    if sinks is not None:
        products = torch.cat([products, sinks.reshape(1, -1, 1, 1).expand(*products.shape[:3], 1)], dim=-1)
    shares = products.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return F.dropout(shares, dropout_p, training=dropout_p > 0) @ value


def _flex_attention(query, key, value, mask, scale, softcap, options):
    from torch.nn.attention.flex_attention import flex_attention

    # or Inductor takes rows of any length, and guards each load of the kernels
    torch._check(query.shape[2] % BLOCK == 0)
    torch._check(key.shape[2] % BLOCK == 0)

    def capped(score, row, head, q, k):
        return softcap * torch.tanh(score / softcap)

    change = None if softcap is None else capped
    return flex_attention(query, key, value, score_mod=change, block_mask=mask, scale=scale, **options)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(_flex_attention)


def flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """An attention function in Transformers' sense: FlexAttention, also for families that Transformers gives none.

    Args:
        query: (1, heads, s, d), s a multiple of BLOCK; key, value: as many or fewer heads.
        attention_mask: a BlockMask.
        softcap, s_aux: of :func:`sliced_attention`.

    Raises:
        NotImplementedError: dropout of the attention, or a change to the products that this function does not know.
    """
    require_known(module, others | {"dropout": dropout or None}, ("position_bias", "dropout"))
    options: dict[str, Any] = {}
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        options["enable_gqa"] = (groups & (groups - 1)) == 0  # kernels group by powers of two
        if not options["enable_gqa"]:
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if s_aux is not None:
        from torch.nn.attention.flex_attention import AuxRequest

        options["return_aux"] = AuxRequest(lse=True)
    is_inside = torch.compiler.is_compiling()  # of a layer that is compiled
    attend = _flex_attention if is_inside else _compiled_flex_attention()
    output = attend(query, key, value, attention_mask, scaling, softcap, options)
    if s_aux is not None:
        output, aux = output  # a sink beside the softmax's sum: its share is taken from what the keys gave
        output = output * torch.sigmoid(aux.lse - s_aux.reshape(1, -1, 1)).unsqueeze(-1).to(output.dtype)
    return output.transpose(1, 2), None


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """An attention function in Transformers' sense: FlashAttention on texts of various lengths in one row.

    Through torch's own ``varlen_attn`` (from 2.10 on) or, before it, the package flash-attn.

    Args:
        query: (1, heads, s, d); key, value: as many or fewer heads.
        attention_mask: where texts begin, (1, 1, r, n + 1).
        sliding_window: as in :func:`sliced_attention`.

    Raises:
        NotImplementedError: dropout of the attention, or a change to the products that the kernel does not know.
        ImportError: there is neither.
    """
    require_known(module, others | {"dropout": dropout or None}, ("softcap", "s_aux", "position_bias", "dropout"))
    begins, longest = attention_mask[0, 0, 0], attention_mask.shape[2]
    behind = -1 if sliding_window is None else sliding_window - 1
    window = (behind, 0 if is_causal_in(module, is_causal) else behind)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (s, heads, d)
    options = {"window_size": window, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        from flash_attn import flash_attn_varlen_func  # its arguments in the same order, other names

        options = {"softmax_scale": scaling, "causal": window[1] == 0, "window_size": window}
        output = flash_attn_varlen_func(query, key, value, begins, begins, longest, longest, **options)
    else:
        query, key, value, options = _as_it_takes(varlen_attn, query, key, value, options)
        output = varlen_attn(query, key, value, begins, begins, longest, longest, **options)
    return output.unsqueeze(0), None


@functools.cache  # every layer asks
def _parameters_of(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _as_it_takes(
    function: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The arguments of torch's ``varlen_attn`` for its older forms: torch 2.10's knows none of the options.

    Raises:
        NotImplementedError: a sliding window for one that has none.
    """
    takes = _parameters_of(function)
    known = {name: value for name, value in options.items() if name in takes}
    if "enable_gqa" not in takes and options["enable_gqa"]:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if "scale" not in takes and options["scale"] is not None:
        query = query * (options["scale"] * query.shape[-1] ** 0.5)
    if "window_size" not in takes:
        if options["window_size"][0] >= 0:
            raise NotImplementedError(f"torch {torch.__version__}'s varlen_attn has no sliding window")
        known["is_causal"] = options["window_size"][1] == 0
    return query, key, value, known


def attention_over_ranks(sequence: SequenceGroup) -> Callable[..., tuple[torch.Tensor, None]]:
    """An attention function in Transformers' sense, for rows of which each rank has the same share of tokens.

    DeepSpeed's Ulysses (arXiv 2309.14509): ranks exchange tokens for heads, attend to whole texts with a share of the
    heads, and exchange them back. Attention is causal; pads on the right are seen by pads alone.
    """
    from deepspeed.sequence.layer import DistributedAttention

    def attend(query, key, value, scaling: float | None, dropout: float):
        options: dict[str, Any] = {"is_causal": True, "scale": scaling, "dropout_p": dropout}
        options["enable_gqa"] = key.shape[2] != query.shape[2]
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # (b, heads, s, d)
        output = F.scaled_dot_product_attention(query, key, value, **options)
        return output.transpose(1, 2)

    exchanged = DistributedAttention(attend, sequence.group, scatter_idx=2, gather_idx=1)

    def sequence_attention(
        module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **others
    ):
        require_known(module, others, ("softcap", "s_aux", "position_bias"))
        heads, width = query.shape[1], query.shape[2] * sequence.size
        if heads % sequence.size:
            raise NotImplementedError(f"{heads} attention heads are no multiple of {sequence.size} processes")
        if sliding_window is not None and sliding_window < width:
            raise NotImplementedError(f"a sliding window of {sliding_window} tokens in a row of {width}")
        if key.shape[1] % sequence.size:
            key, value = (states.repeat_interleave(heads // key.shape[1], dim=1) for states in (key, value))
        states = (each.transpose(1, 2).contiguous() for each in (query, key, value))  # (b, s / ranks, heads, d)
        return exchanged(*states, batch_dim_idx=0, scaling=scaling, dropout=dropout), None

    return sequence_attention


for name, function in ((SLICES, sliced_attention), (FLEX, flex_attention), (VARLEN, varlen_attention)):
    ALL_ATTENTION_FUNCTIONS.register(name, function)


def window(config: PretrainedConfig) -> float:
    """Tokens that a layer of the model looks back on at most."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    limits = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    used = [name for kind, name in limits.items() if kinds is None or kind in kinds]
    return min([getattr(config, name, None) or math.inf for name in used], default=math.inf)
