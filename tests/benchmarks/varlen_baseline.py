# SPDX-License-Identifier: Apache-2.0
"""What others do on a GPU: whole texts one after the other in a row, by PyTorch's attention of variable length.

A comparison without a prompt, whose responses are the whole texts, is such a row in this package's terms; the backend
takes the name of the one whose mask is the sizes of the segments.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reward_model.models.shared_prefix import AttentionBackend

NAME = "varlen_baseline"
BACKEND = AttentionBackend("slices", "packed", NAME)
LONGEST = 512  # tokens of a text: of the work that steps.py draws


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """query: (1, heads, s, d); key, value: as many heads or fewer; attention_mask: of each pair 2, 0, two lengths."""
    lengths = attention_mask.view(-1, 4)[:, 2:].flatten()
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        takes = inspect.signature(varlen_attn).parameters
        options = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        states = [part[0].transpose(0, 1) for part in (query, key, value)]
        return varlen_attn(*states, starts, starts, LONGEST, LONGEST, scale=scaling, **options)[None], None
    parts = zip(*(part.split(lengths.tolist(), dim=2) for part in (query, key, value)))  # a rehearsal
    options = {"is_causal": True, "scale": scaling, "enable_gqa": True}
    return torch.cat([F.scaled_dot_product_attention(*part, **options) for part in parts], 2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
