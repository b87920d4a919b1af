# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model folder, read from that folder."""

import os

from transformers import AutoTokenizer


def tokenizer_of_folder(folder, config, get_tokenizer):
    """Load a local model's tokenizer.

    Args:
        folder: the model's folder.
        config: its ``config.json``, a dict.
        get_tokenizer: DeepSpeed-Chat's, which chooses the pad by the model's name.

    A folder that step 1, 2 or 3 saved keeps the pad it was trained with. Any other gets the pad that its model's name
    always gave it (``[PAD]`` for a LLaMA without one, else the end token). A folder without a tokenizer of its own
    (saved before this patch) falls back to the model that it came from.
    """
    name = config.get("_name_or_path") or folder
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        if name == folder:
            print(f"{folder}: no tokenizer_config.json, so its pad, start and end tokens are a guess", flush=True)
        return get_tokenizer(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    if "end_token_id" in config:  # DeepSpeed-Chat writes it into every config that it saves
        return tokenizer
    if "llama" not in name:
        tokenizer.pad_token = tokenizer.eos_token
    elif tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer
