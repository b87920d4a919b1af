# SPDX-License-Identifier: Apache-2.0
"""The keys that Transformers 4 reads (test_versions.py scores with it), and that Transformers 5 still reads its own."""

import json

import models
import pytest
import tiny
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from reward_model.inference import load
from reward_model.models import saving
from reward_model.models.for_transformers_4 import add_rope_keys, add_tokenizer_keys
from reward_model.models.loading import load_for_training

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="Transformers 4 writes its own keys")

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}


def layers(full, sliding):
    return {"full_attention": full, "sliding_attention": sliding}


def plain(theta, **others):
    return {"rope_type": "default", "rope_theta": theta, **others}


@pytest.mark.parametrize(
    ("model_type", "rope", "written"),
    [
        ("llama", plain(5e5), {"rope_theta": 5e5, "rope_scaling": None}),
        (
            "llama",
            {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA_3},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
        ),
        ("phi", plain(7.0, partial_rotary_factor=0.4), {"rope_theta": 7.0, "partial_rotary_factor": 0.4}),
        ("gpt_neox", plain(7.0, partial_rotary_factor=0.4), {"rotary_emb_base": 7.0, "rotary_pct": 0.4}),
        (
            "qwen2_5_vl_text",
            plain(7.0, mrope_section=[1, 1, 2]),
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        ),
        (
            "phi3",
            {**LONG, "rope_theta": 7.0, "original_max_position_embeddings": 16},
            {
                "original_max_position_embeddings": 16,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]},
            },
        ),
        (
            "gemma3_text",
            layers({"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}, plain(1e4)),
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        ("modernbert", layers(plain(16.0), plain(8.0)), {"global_rope_theta": 16.0, "local_rope_theta": 8.0}),
        ("olmo3", layers(plain(16.0), plain(16.0)), {"rope_theta": 16.0, "rope_scaling": None}),
    ],
)
def test_rotary_embeddings_under_their_old_names(model_type, rope, written):
    config = {"model_type": model_type, "max_position_embeddings": 64, "rope_parameters": rope}
    assert add_rope_keys(config) == ""
    assert config["rope_parameters"] == rope
    assert {name: config[name] for name in written} == written


def test_a_text_part_inside_another_config():
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "rope_parameters": plain(7.0)}}
    assert add_rope_keys(config) == ""
    assert config["text_config"]["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("model_type", "rope", "said"),
    [
        ("gemma4_text", {"rope_type": "proportional", "rope_theta": 1.0}, "the type proportional"),
        ("olmo3", layers(plain(16.0), plain(8.0)), "differ from layer to layer"),
        ("gemma3_text", layers(plain(16.0), {"rope_type": "linear", "factor": 2.0, "rope_theta": 8.0}), "differ from"),
        ("gemma3_text", layers(plain(16.0, partial_rotary_factor=0.5), plain(8.0)), "differ from"),
        ("phi3", {**LONG, "factor": 3.0, "original_max_position_embeddings": 16}, "longrope's factor 3.0"),
    ],
)
def test_what_transformers_4_has_no_key_for_is_told(model_type, rope, said):
    config = {"model_type": model_type, "max_position_embeddings": 64, "rope_parameters": rope}
    assert said in add_rope_keys(config)


def test_tokenizer_of_a_class_and_special_tokens_that_transformers_4_knows():
    config = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    add_tokenizer_keys(config)
    assert config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "model_input_names": ["input_ids", "attention_mask"],
    }
    own = {"tokenizer_class": "SomebodysTokenizer", "extra_special_tokens": ["<a>"]}
    add_tokenizer_keys(own)
    assert own == {"tokenizer_class": "SomebodysTokenizer", "extra_special_tokens": ["<a>"]}


def write_scaled(folder):
    """A LLaMA with a large base and Llama 3's scaling, and a tokenizer with special tokens of its own."""
    tokenizer = tiny.chatml(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA_3}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("llama", **models.GROUPED, **ids, rope_parameters=rope))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder)


@pytest.mark.parametrize("form", ["hf", "dschat", "both"])
def test_every_form_has_the_old_keys_and_loads_as_before(form, tmp_path):
    write_scaled(tmp_path / "base")
    scorer = load_for_training(str(tmp_path / "base"), torch.float32, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    saving.save(scorer, tokenizer, tmp_path / "out", form)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "llama3", **LLAMA_3}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["additional_special_tokens"]
    again, reloaded = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.scorer.config.rope_parameters == scorer.config.rope_parameters
    assert reloaded.extra_special_tokens == tokenizer.extra_special_tokens
    assert type(reloaded) is type(tokenizer)
