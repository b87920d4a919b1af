# SPDX-License-Identifier: Apache-2.0
"""Tiny models of many families, with random weights, and texts for them."""

from types import SimpleNamespace

import tiny
import torch
import transformers

VOCABULARY = 320
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16}
DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8}),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 8}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
}
ENCODERS = {
    "bert": ("BertModel", "BertConfig", SIZES),
    "roberta": ("RobertaModel", "RobertaConfig", SIZES),
    "deberta": ("DebertaV2Model", "DebertaV2Config", SIZES),
    "ernie": ("ErnieModel", "ErnieConfig", SIZES),
}
TOKENIZERS = {"roberta": tiny.roberta}
NO_CLASS = {"cohere": ("CohereForCausalLM", "CohereConfig", GROUPED)}  # Transformers cannot classify with it
FAMILIES = DECODERS | ENCODERS | NO_CLASS


def write(family, folder, **other_sizes):
    """A model and a tokenizer in a folder, as a user finds them. Other sizes: for the names that the family has."""
    model_class, config_class, sizes = FAMILIES[family]
    sizes = sizes | {name: size for name, size in other_sizes.items() if name in sizes}
    make = TOKENIZERS.get(family, tiny.bert if family in ENCODERS else tiny.tokenizer)
    tokenizer = make(folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():  # as large as trained ones: 0.02 would hide mistakes
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return tokenizer


def batch(tokenizer, rows=6, longest=20, seed=1):
    """Right-padded texts that end in the end token: input_ids, attention_mask, ends."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids = torch.randint(10, VOCABULARY, (rows, longest), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids[torch.arange(rows), lengths - 1] = end
    return SimpleNamespace(
        input_ids=torch.where(mask.bool(), ids, tokenizer.pad_token_id), attention_mask=mask, ends=lengths - 1
    )
