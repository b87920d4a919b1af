# SPDX-License-Identifier: Apache-2.0
"""Special tokens: the end of a text, a pad that differs from it, and what the embedding must hold."""

import json

import pytest
import tiny

from reward_model.common.errors import UserError, first_line
from reward_model.data.tokenizer import choose_special_tokens, load_tokenizer

KINDS = {
    "own pad": tiny.tokenizer,
    "no pad": lambda: tiny.tokenizer(pad_token=None),
    "pad is the end": lambda: tiny.tokenizer(pad_token=tiny.EOS),
    "reserved": lambda: tiny.tokenizer(pad_token=tiny.EOS, reserved=["<|reserved_special_token_0|>", "<|fim|>"]),
    "llama": lambda: tiny.llama(pad_token=None),
    "start is the end": lambda: tiny.tokenizer(pad_token=None, bos_token=tiny.EOS),
    "bert": tiny.bert,
    "chatml": tiny.chatml,
    "chatml, end of turn is the end": lambda: tiny.chatml(eos_token="<|im_end|>", pad_token="<|im_end|>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_roles_share_an_id(kind):
    tokenizer = KINDS[kind]()
    special = choose_special_tokens(tokenizer, len(tokenizer))
    assert special.pad == tokenizer.pad_token_id
    assert special.pad != special.end
    assert special.pad not in special.endings | special.starts
    assert special.end in special.endings
    assert special.rows == len(tokenizer)  # every id has a row, and no row lacks an id
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer)


def test_own_pad_is_kept(capsys):
    tokenizer = tiny.tokenizer()
    special = choose_special_tokens(tokenizer, 1000)
    assert tokenizer.pad_token == tiny.PAD
    assert special.rows == len(tokenizer)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("reserved", ["<|reserved_special_token_0|>", "[unused7]", "<|placeholder1|>", "<pad>"])
@pytest.mark.parametrize("pad", [None, tiny.EOS])
def test_reserved_token_becomes_the_pad(reserved, pad, capsys):
    tokenizer = tiny.tokenizer(pad_token=pad, reserved=["<|fim|>", reserved])
    size = len(tokenizer)
    special = choose_special_tokens(tokenizer, size)
    assert tokenizer.pad_token == reserved
    assert special.rows == len(tokenizer) == size
    assert f"pad token: {reserved} (reserved in the vocabulary)" in capsys.readouterr().out


def test_reserved_word_that_is_no_special_token_stays_a_word():
    sentences = ["a reserved table is reserved for the reserved guest"] * 3
    tokenizer = tiny.tokenizer(pad_token=None, sentences=sentences)
    assert any("reserved" in token for token in tokenizer.get_vocab())
    choose_special_tokens(tokenizer, len(tokenizer))
    assert tokenizer.pad_token == "<|pad|>"


@pytest.mark.parametrize("pad", [None, tiny.EOS])
def test_new_pad_where_none_is_reserved(pad, capsys):
    tokenizer = tiny.tokenizer(pad_token=pad)
    size = len(tokenizer)
    special = choose_special_tokens(tokenizer, size)
    assert special.pad == size
    assert special.rows == size + 1  # the embedding grows by one
    assert tokenizer.pad_token == "<|pad|>"
    assert "added to the vocabulary" in capsys.readouterr().out


def test_reserved_token_without_an_embedding_row_is_not_taken():
    tokenizer = tiny.tokenizer(pad_token=None)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>"]})
    special = choose_special_tokens(tokenizer, size, added=1)
    assert special.rows == size + 2
    assert special.pad == size + 1


def test_chosen_pad_survives_saving(tmp_path):
    tokenizer = tiny.tokenizer(pad_token=tiny.EOS)
    special = choose_special_tokens(tokenizer, len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert choose_special_tokens(loaded, special.rows) == special
    assert loaded("a b<|pad|>")["input_ids"][-1] == special.pad


def test_ends_and_starts_of_each_kind():
    chatml, llama, bert = tiny.chatml(), tiny.llama(), tiny.bert()
    of_chatml = choose_special_tokens(chatml, 1000)
    assert of_chatml.end == chatml.eos_token_id
    assert chatml.convert_tokens_to_ids("<|im_end|>") in of_chatml.endings
    of_llama = choose_special_tokens(llama, 1000)
    assert of_llama.starts == {llama.bos_token_id}
    assert of_llama.endings == {llama.eos_token_id}
    of_bert = choose_special_tokens(bert, 1000)
    assert of_bert.end == bert.sep_token_id
    assert of_bert.starts == {bert.cls_token_id}


def test_eot_token_is_one_token_that_ends_texts(tmp_path):
    tiny.tokenizer(tmp_path, eos_token="</s>")
    plain, with_eot = load_tokenizer(str(tmp_path)), load_tokenizer(str(tmp_path), add_eot_token=True)
    assert len(plain("a<|endoftext|>")["input_ids"]) > 2
    assert with_eot("a<|endoftext|>")["input_ids"][1:] == [len(plain)]
    special = choose_special_tokens(with_eot, len(plain), added=1)
    assert special.end == len(plain)
    assert special.rows == len(plain) + 1


def test_eot_token_mends_a_tokenizer_without_an_end(tmp_path):
    tiny.tokenizer(tmp_path, eos_token=None)
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"no end token.*--add_eot_token"):
        choose_special_tokens(tokenizer, len(tokenizer))
    tokenizer = load_tokenizer(str(tmp_path), add_eot_token=True)
    assert choose_special_tokens(tokenizer, len(tokenizer) - 1, added=1).end == tokenizer.eos_token_id


def test_vocabulary_larger_than_the_embedding():
    tokenizer = tiny.tokenizer()
    size = len(tokenizer)
    with pytest.raises(UserError, match=f"tokenizer has {size} tokens and the model's embedding {size - 1} rows"):
        choose_special_tokens(tokenizer, size - 1)


def test_tokens_added_to_the_tokenizer_alone_let_the_embedding_grow(capsys):
    """As [PAD] of many LLaMA fine-tunes; a vocabulary that belongs to another model is refused all the same."""
    tokenizer = tiny.tokenizer(pad_token=None)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    special = choose_special_tokens(tokenizer, size, may_grow=True)
    assert (special.pad, special.rows) == (size, size + 1)
    assert "1 token has been added to the tokenizer alone" in capsys.readouterr().out
    for rows, grows in ((size, False), (size - 1, True)):
        with pytest.raises(UserError, match="do not belong together"):
            choose_special_tokens(tokenizer, rows, may_grow=grows)


def test_folder_without_a_tokenizer_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_texts_are_padded_on_the_right(tmp_path):
    tiny.tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": "left"}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(["a", "a cat"], padding=True)["input_ids"][0][-1] == loaded.pad_token_id


def test_first_line_that_says_something():
    assert first_line(ValueError("\n\n  what happened \nand more")) == "what happened"
    assert first_line(KeyError()) == "KeyError"
