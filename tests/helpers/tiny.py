# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of a few hundred tokens, one of each kind that models come with."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD, BOS = "<|endoftext|>", "<|pad|>", "<s>"
SENTENCES = (
    "the cat sat on the mat and the other cat sat there",
    "question: what does the cat eat? answer: the cat eats fish.",
    "\n\nHuman: Where is the cat? \n\nAssistant: The cat is there. On the mat.",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(
    folder=None,
    sentences=SENTENCES,
    reserved=(),
    opening="",
    closing="",
    pair=None,
    inputs=("input_ids", "attention_mask"),
    chat_template=None,
    **special,
):
    """A byte-level BPE tokenizer, saved into ``folder`` if there is one.

    reserved: special tokens without a role. opening, closing: what is put around every text. pair: the template of two
    texts, with segment ids; None: nothing is between them. inputs: what it gives a model. special: eos_token, pad_token
    and so on; None leaves one out.
    """
    special = {name: token for name, token in {"eos_token": EOS, "pad_token": PAD, **special}.items() if token}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = list(dict.fromkeys([*special.values(), *reserved]))
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=tokens, show_progress=False)
    bpe.train_from_iterator(sentences, trainer)
    if opening or closing:
        around = [(token, bpe.token_to_id(token)) for token in (opening, closing) if token]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A {closing}".strip(), pair=pair or "$A:0 $B:1", special_tokens=around
        )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, model_input_names=list(inputs), **special)
    made.chat_template = chat_template
    if folder is not None:
        made.save_pretrained(folder)
    return made


def llama(folder=None, **special):
    """Every text begins with a start token."""
    return tokenizer(folder, opening=BOS, **{"bos_token": BOS, **special})


def bert(folder=None, **special):
    """[CLS] before and [SEP] after every text, and no eos_token; of a pair the second text is segment 1."""
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "eos_token": None}
    around = {"opening": "[CLS]", "closing": "[SEP]", "pair": "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"}
    around["inputs"] = ("input_ids", "token_type_ids", "attention_mask")
    return tokenizer(folder, **{**around, **roles, **special})


def roberta(folder=None, **special):
    """<s> before and </s> after every text, two </s> between those of a pair, and no segment ids."""
    roles = {"bos_token": BOS, "cls_token": BOS, "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    made = tokenizer(**{**roles, **special})
    ends = ((token, made.convert_tokens_to_ids(token)) for token in ("</s>", BOS))
    made.backend_tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    if folder is not None:
        made.save_pretrained(folder)
    return made


def chatml(folder=None, **special):
    """Chat template that closes a turn with <|im_end|> and a line break; the eos_token is another one."""
    marks = ("<|im_start|>", "<|im_end|>")
    return tokenizer(folder, reserved=marks, **{"chat_template": CHATML, **special})
