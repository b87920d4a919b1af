# SPDX-License-Identifier: Apache-2.0
"""The ways in which others score with a saved model, in a process of its own.

``python -m reward_model.training.ways QUESTION ANSWER``: the first file is a question as
:mod:`reward_model.training.verification` writes it, JSON; the second gets a line of JSON when a way begins and one when
it ends. Each way goes by the files in the folder and by the library's own code, not by ours, except where it says so.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import quieten
from reward_model.inference import RewardScorer, load
from reward_model.models import saving
from reward_model.models.many_heads import mean_head
from reward_model.models.saved_forms import Form, form_of
from reward_model.models.scorer import SCORE_PAIRS
from reward_model.models.st_modules import pooling_in, read_dense
from reward_model.reward_model import RewardModel
from reward_model.training import verify
from reward_model.training.texts import Text, batches, end_token, scored_as, whole

BATCH = 8  # texts of unlike lengths, so that there are pads


class NotVerified(Exception):
    """A way cannot be tried here; says why."""


class NotItsWay(Exception):
    """A way does not lead to the model by its nature, which is no fault of the folder; says why."""


class Saved:
    """A folder, and what is asked of it: texts, each with a prompt and a response."""

    def __init__(
        self, folder: Path, texts: Sequence[Text], trust_remote_code: bool = False, adapter: Path | None = None
    ):
        self.folder, self.texts, self.trust = folder, list(texts), trust_remote_code
        self.adapter = adapter or folder / "adapter"
        self.values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.form: Form | None = form_of(folder, "hf")
        if self.form is None and not any(folder.glob("*.safetensors")):
            self.form = form_of(folder, "dschat")

    @cached_property
    def is_pairs(self) -> bool:
        """Whether prompt and response are a pair for the tokenizer; of a model of others our rule says it."""
        said = self.values.get(SCORE_PAIRS)
        return self.ours.encoding.pairs if said is None else bool(said)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust)

    @cached_property
    def end(self) -> str:
        """What is added to a text for this tokenizer."""
        return end_token(self.tokenizer) or ""

    @cached_property
    def ours(self) -> RewardScorer:
        return load(self.folder, trust_remote_code=self.trust)

    def strings(self, texts: Sequence[Text], end: str | None = None) -> list[str]:
        """Texts as somebody would write them: joined and closed, or what the chat template writes."""
        end = self.end if end is None else end
        found = []
        for text in texts:
            written = whole(text, self.tokenizer)
            is_closed = text.templated or text.messages or not end or written.endswith(end)
            found.append(written if is_closed else written + end)
        return found

    def encoded(self, texts: Sequence[Text], side: str = "right", end: str | None = None) -> dict[str, torch.Tensor]:
        """A padded batch of texts, all of them of a chat template or none, as the tokenizer makes it."""
        templated = texts[0].templated or bool(texts[0].messages)
        given = [[text.prompt for text in texts], [text.response for text in texts]]
        columns = given if self.is_pairs and not templated else [self.strings(texts, end)]
        batch = self.tokenizer(
            *columns, padding=True, padding_side=side, add_special_tokens=not templated, return_tensors="pt"
        )
        return dict(batch)

    def in_batches(self, score: Callable[[list[Text]], Any], texts: Sequence[Text] | None = None) -> list[float]:
        """The scores that a function gives for batches, in the order of the texts."""
        texts = self.texts if texts is None else texts
        found = [0.0] * len(texts)
        for places, batch in batches(texts, BATCH):
            with torch.no_grad():
                scores = score(batch)
            for place, value in zip(places, torch.as_tensor(scores).float().flatten().tolist(), strict=True):
                found[place] = value
        return found

    def classifier(self, dtype: torch.dtype | str = "auto", folder: Path | None = None) -> torch.nn.Module:
        """The model as Transformers' class for it, every weight of which has to be in the files."""
        if self.form is not None:
            raise NotItsWay(_without_class(self))
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder or self.folder, dtype=dtype, output_loading_info=True, trust_remote_code=self.trust
        )
        _require_all(info)
        if model.config.num_labels != 1:
            raise ValueError(f"it has {model.config.num_labels} labels")
        return model.eval()


def _without_class(saved: Saved) -> str:
    if saved.form == "modules":
        return "AutoModelForSequenceClassification would draw a new head: the model is saved as modules"
    return "Transformers refuses this form"


def _require_all(info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in info[kind] if ".pooler." not in f".{name}"]
        if names:
            raise ValueError(f"{len(names)} {kind.replace('_', ' ')}, {sorted(names)[0]} among them")


# --- the ways ---


def ours(saved: Saved) -> dict[str, Any]:
    """Our evaluation: raw scores, how far rounding may take them, and the mean."""
    reward, texts = saved.ours, saved.texts
    scores = [0.0] * len(texts)
    for i, text in enumerate(texts):
        if text.messages:
            scores[i] = reward.score_chats([text.messages])[0]
        elif text.templated:
            scores[i] = reward.score_ids([verify.whole(scored_as(text, reward.encoding))])[0]
    plain = [i for i, text in enumerate(texts) if not (text.messages or text.templated)]
    found = reward.score([texts[i].prompt for i in plain], [texts[i].response for i in plain])
    for i, score in zip(plain, found):
        scores[i] = score
    _, products = verify._score(reward.forward, [scored_as(text, reward.encoding) for text in texts])
    raw = torch.tensor(scores) + reward.mean
    config = reward.scorer.config
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 12
    dtype = next(reward.scorer.parameters()).dtype
    return {
        "scores": raw.tolist(),
        "tolerances": verify.tolerances(raw, products, dtype, layers).tolist(),
        "note": f"{str(dtype).removeprefix('torch.')}, {type(reward.scorer.unwrapped).__name__}",
        "mean": reward.mean,
    }


def special_tokens(saved: Saved) -> dict[str, Any]:
    """Whether a text has one start and one end token, and the pad is no end."""
    tokenizer, pad = saved.tokenizer, _text_values(saved.values).get("pad_token_id")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids = list(tokenizer("a" + saved.end, verbose=False)["input_ids"])
    begins = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None, end}
    ends = next((i for i, each in enumerate(reversed(ids)) if each != end), len(ids))
    starts = next((i for i, each in enumerate(ids) if each not in begins), len(ids))
    named = saved.values.get("reward_model") or {}
    if ends != 1 or starts > 1:
        return {"problem": f"a text gets {starts} start and {ends} end tokens"}
    if "end_token" in named and (named["end_token"] or "") != saved.end:
        was, now = (f"{each} is added to a text" if each else "none is" for each in (named["end_token"], saved.end))
        return {"problem": f"end token: {was} by config.json, and {now} for this tokenizer"}
    run = _run_of(saved.folder)
    if run and pad != run["special"]["pad"]:
        return {"problem": f"pad_token_id in config.json is {pad}, and the training's pad was {run['special']['pad']}"}
    if tokenizer.pad_token_id is not None and pad != tokenizer.pad_token_id:
        return {
            "problem": f"pad_token_id in config.json is {pad}, and the tokenizer pads with {tokenizer.pad_token_id}"
        }
    closes = f"a text has to be closed with {saved.end}" if saved.end else "the tokenizer closes a text itself"
    if pad == end:
        return {"note": f"{closes}; the pad is the end token, so that the score is that of the token before"}
    return {"note": f"{closes}; the pad is {tokenizer.convert_ids_to_tokens(pad) if pad is not None else 'not set'}"}


def _run_of(folder: Path) -> dict[str, Any]:
    """What ``run.json`` of the run that left a folder says; empty: none of ours did."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return run if "pad" in run["special"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _text_values(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that is about text, where a model has several."""
    inner = values.get("text_config")
    return values | inner if isinstance(inner, dict) else values


def in_float32(saved: Saved) -> dict[str, Any]:
    """Transformers, in float32."""
    return _by_transformers(saved, torch.float32)


def as_saved(saved: Saved) -> dict[str, Any]:
    """Transformers, in the dtype of the files."""
    return _by_transformers(saved, "auto")


def _by_transformers(saved: Saved, dtype: torch.dtype | str) -> dict[str, Any]:
    if saved.form == "modules":
        score = _modules(saved, dtype)
        note = "the modules by hand: AutoModel, a mean or the last token, a dense layer"
        return {
            "scores": saved.in_batches(lambda batch: score(saved.encoded(batch))),
            "applies_mean": True,
            "note": note,
        }
    model = saved.classifier(dtype)
    return {"scores": saved.in_batches(lambda batch: model(**saved.encoded(batch)).logits)}


def _modules(saved: Saved, dtype: torch.dtype | str) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """What Sentence-Transformers' three modules compute, by AutoModel."""
    model, info = AutoModel.from_pretrained(
        saved.folder, dtype=dtype, output_loading_info=True, trust_remote_code=saved.trust
    )
    _require_all(info)
    model.eval()
    weight, bias = read_dense(saved.folder)
    pooling = pooling_in(saved.folder)

    def score(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model(**batch)[0].float()
        mask = batch["attention_mask"]
        if pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            pooled = hidden[torch.arange(len(hidden)), last]
        return pooled @ weight[0] + (bias or 0.0)

    return score


def padded_left(saved: Saved) -> dict[str, Any]:
    """Transformers with pads before the text; where these shift positions, with positions given, too."""
    if saved.form == "modules":
        score = _modules(saved, "auto")
        answer: dict[str, Any] = {"applies_mean": True}
    else:
        model = saved.classifier()
        answer = {}
        if not hasattr(model, "score") and saved.tokenizer.padding_side != "left":
            raise NotItsWay("its head reads the first token of a row: pad on the right, as its tokenizer does")

        def score(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return model(**batch).logits

    def with_positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return score(batch | {"position_ids": positions})

    answer["scores"] = saved.in_batches(lambda batch: score(saved.encoded(batch, "left")))
    try:
        answer["otherwise"] = saved.in_batches(lambda batch: with_positions(saved.encoded(batch, "left")))
    except TypeError:  # a model that takes no positions
        return answer
    answer["why_otherwise"] = (
        "the model counts positions from the left of a row, pads included: pad on the right, as its tokenizer does"
    )
    if saved.tokenizer.padding_side == "left":
        answer.pop("otherwise")  # then that is what everybody gets
    return answer


def chat(saved: Saved) -> dict[str, Any]:
    """``apply_chat_template`` with its own tokenization, one chat at a time."""
    places = [i for i, text in enumerate(saved.texts) if text.messages]
    if not places:
        raise NotItsWay("the tokenizer has no chat template" if not saved.tokenizer.chat_template else "no chat fits")
    if saved.form == "modules":
        score, answer = _modules(saved, "auto"), {"applies_mean": True}
    else:
        model, answer = saved.classifier(), {}

        def score(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return model(**batch).logits

    scores: list[float | None] = [None] * len(saved.texts)
    for i in places:
        batch = saved.tokenizer.apply_chat_template(
            saved.texts[i].messages, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            scores[i] = float(score({name: batch[name] for name in ("input_ids", "attention_mask")}))
    return answer | {"scores": scores}


def pipeline(saved: Saved) -> dict[str, Any]:
    """Transformers' pipeline as it is called by default, which chooses the function by ``config.json``."""
    from transformers import pipeline as make

    saved.classifier()  # or the reason why not
    pipe = make("text-classification", model=str(saved.folder), device="cpu", trust_remote_code=saved.trust)
    scores = []
    for text, written in zip(saved.texts, saved.strings(saved.texts)):
        templated = text.templated or bool(text.messages)
        given = {"text": text.prompt, "text_pair": text.response} if saved.is_pairs and not templated else written
        found = pipe(given, add_special_tokens=False) if templated else pipe(given)
        scores.append((found[0] if isinstance(found, list) else found)["score"])
    return {"scores": scores}


def saved_again(saved: Saved) -> dict[str, Any]:
    """Loaded, saved by whoever loads it, and loaded once more."""
    with tempfile.TemporaryDirectory() as place:
        again = Path(place)
        if saved.form is not None:
            form = "dschat" if saved.form == "dschat" else "hf"
            saving.save(saved.ours.scorer, saved.ours.tokenizer, again, form)
            copy = Saved(again, saved.texts, saved.trust)
            return {"scores": ours(copy)["scores"], "note": "by reward_model.inference"}
        saved.classifier().save_pretrained(again)
        saved.tokenizer.save_pretrained(again)
        model = saved.classifier(folder=again)
        copy = Saved(again, saved.texts, saved.trust)
        return {"scores": saved.in_batches(lambda batch: model(**copy.encoded(batch)).logits)}


def adapter(saved: Saved) -> dict[str, Any]:
    """The base with the adapter beside it, by PEFT, where ``adapter/`` is there."""
    if not (saved.adapter / "adapter_config.json").is_file():
        raise NotItsWay("there is no adapter/")
    model = with_adapter(saved)
    return {"scores": saved.in_batches(lambda batch: model(**saved.encoded(batch)).logits)}


def with_adapter(saved: Saved) -> torch.nn.Module:
    """The base that an adapter names, with the adapter, as its card shows."""
    from peft import PeftModel

    place, trust = saved.adapter, saved.trust
    base = json.loads((place / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise NotVerified("adapter_config.json names no base model")
    run = _run_of(place.parent)
    if run.get("lora_bits"):
        raise NotVerified(f"the adapter fits a base in {run['lora_bits']} bits, which needs bitsandbytes")
    try:
        config = AutoConfig.from_pretrained(base, num_labels=1, trust_remote_code=trust)
    except Exception as error:  # OSError, ValueError
        raise NotVerified(f"its base {base} is not here") from error
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise NotItsWay("its base has no classification class in Transformers")
    own = AutoConfig.from_pretrained(saved.folder, trust_remote_code=trust)
    rows, dtype = own.get_text_config().vocab_size, getattr(own, "dtype", None) or torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(
        base, config=config, dtype=dtype, trust_remote_code=trust
    )
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust)
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    return PeftModel.from_pretrained(model, place).eval()


def deepspeed_chat(saved: Saved) -> dict[str, Any]:
    """DeepSpeed-Chat's file under its reward model (the drop-in), asked as step 3 asks: by a prompt's length."""
    if not (saved.folder / saving.DSCHAT_WEIGHTS).is_file():
        raise NotItsWay(f"there is no {saving.DSCHAT_WEIGHTS}")
    if form_of(saved.folder, "dschat") != "dschat":
        raise NotItsWay(f"{saving.DSCHAT_WEIGHTS} is none of DeepSpeed-Chat's")
    reward = load(saved.folder, form="dschat", trust_remote_code=saved.trust)
    pad = reward.tokenizer.pad_token_id
    model = RewardModel(reward.scorer.backbone, reward.tokenizer).eval()
    with torch.no_grad():
        model.v_head.weight.copy_(mean_head(reward.scorer)["weight"])
    scores = []
    for text in saved.texts:
        ids = verify.whole(scored_as(text, reward.encoding))
        row = torch.tensor([[*ids, pad, pad]])
        with torch.no_grad():
            found = model.forward_value(row, (row != pad).long(), prompt_length=1)
        scores.append(float(found["chosen_end_scores"]))
    return {"scores": scores}


def openrlhf(saved: Saved) -> dict[str, Any]:
    """How OpenRLHF's reward model reads the files, done here: AutoModel and a head by the name in ``config.json``."""
    if saved.form is not None:
        raise NotItsWay("its loader reads a decoder with a head in one file of Transformers' form")
    head = saved.values.get("value_head_prefix", "score")
    found = list(_tensors(saved.folder, f"{head}.weight"))
    if not found:
        raise NotItsWay(f"the files have no {head}.weight: its reward model is a decoder with a linear layer")
    model = AutoModel.from_pretrained(saved.folder, dtype="auto", trust_remote_code=saved.trust).eval()
    weight = found[0].to(model.dtype)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def score(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        given = {"input_ids": batch["input_ids"], "attention_mask": mask}
        hidden = model(**given, **({"position_ids": positions} if takes_positions else {}))[0]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return (hidden[torch.arange(len(hidden)), last] @ weight.T).squeeze(-1)

    note = "read as its loader reads; normalize_reward "
    if "mean" in saved.values:
        note += f"subtracts {saved.values['mean']:.4g} (under Transformers 5 something else: leave it out)"
    else:
        note += "finds no mean in config.json (reward-model export --to openrlhf writes it)"
    return {"scores": saved.in_batches(lambda batch: score(saved.encoded(batch))), "note": note}


def _tensors(folder: Path, name: str) -> Iterator[torch.Tensor]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118
                yield file.get_tensor(name)


def trl(saved: Saved) -> dict[str, Any]:
    """As TRL's trainers load and read a reward model: float32, the tokenizer's pad, texts closed by eos_token."""
    version = _installed("trl")
    model = saved.classifier(torch.float32)
    eos = saved.tokenizer.eos_token
    pad = saved.tokenizer.pad_token_id if saved.tokenizer.pad_token_id is not None else saved.tokenizer.eos_token_id
    model.config.get_text_config().pad_token_id = pad
    has_plain = any(not (text.templated or text.messages) for text in saved.texts)
    if not hasattr(model, "score"):
        raise NotItsWay("it scores decoders; of an encoder it closes a text twice, or not at all")
    if eos is None and has_plain:
        raise NotItsWay("it closes texts with eos_token, and this tokenizer has none")
    found = saved.in_batches(lambda batch: model(**saved.encoded(batch, end=eos)).logits)
    return {"scores": found, "note": f"loaded as TRL {version} does"}


def cross_encoder(saved: Saved) -> dict[str, Any]:
    """Sentence-Transformers' CrossEncoder with its default function."""
    version = _installed("sentence_transformers", "sentence-transformers")
    saved.classifier()  # or the reason why not
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(saved.folder), device="cpu", trust_remote_code=saved.trust)
    takes_chats = bool(saved.tokenizer.chat_template) and not saved.is_pairs
    given = [i for i, text in enumerate(saved.texts) if bool(text.messages) is takes_chats and not text.templated]
    if not given:
        raise NotItsWay("it puts a text through the chat template, and no text here is a chat")
    scores: list[float | None] = [None] * len(saved.texts)
    chosen = [saved.texts[i] for i in given]
    if saved.is_pairs:
        found = list(model.predict([[t.prompt, t.response] for t in chosen], show_progress_bar=False))
        note = ""
    elif takes_chats:
        found = list(model.predict([text.messages for text in chosen], show_progress_bar=False))
        note = ", given messages: it puts a plain text through the chat template, too"
    else:
        found = [_score_of_one(model, text) for text in saved.strings(chosen)]
        note = ", given the joined text: a pair gets a separator, and another score"
    for i, score in zip(given, found):
        scores[i] = float(score)
    note = f"sentence-transformers {version}{note}"
    return {"scores": scores, "note": note}


def _score_of_one(model, text: str) -> float:
    """What a CrossEncoder gives for a text alone, which versions before 6 take as a row of one."""
    try:
        return model.predict([[text]], show_progress_bar=False)[0]
    except ValueError:
        return model.predict(text, show_progress_bar=False)


def sentence_transformer(saved: Saved) -> dict[str, Any]:
    """SentenceTransformer, whose embedding is the score."""
    if saved.form != "modules":
        writes = "; reward-model export --to sentence-transformers writes them"
        raise NotItsWay("the folder has no modules" + (writes if saved.ours.scorer.pooling == "last" else ""))
    version = _installed("sentence_transformers", "sentence-transformers")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(saved.folder), device="cpu", trust_remote_code=saved.trust)
    given = [i for i, text in enumerate(saved.texts) if not (text.templated or text.messages)]
    chosen = [saved.texts[i] for i in given]
    pairs = [(text.prompt, text.response) for text in chosen]
    embedded = model.encode(pairs if saved.is_pairs else saved.strings(chosen), show_progress_bar=False)
    scores: list[float | None] = [None] * len(saved.texts)
    for i, vector in zip(given, embedded):
        scores[i] = float(vector[0])
    return {"scores": scores, "applies_mean": True, "note": f"sentence-transformers {version}"}


def _installed(module: str, package: str | None = None) -> str:
    if importlib.util.find_spec(module) is None:
        raise NotVerified(f"{package or module} is not installed")
    return metadata.version(package or module)


WAYS: dict[str, Callable[[Saved], dict[str, Any]]] = {
    "our evaluation": ours,
    "special tokens": special_tokens,
    "Transformers, float32": in_float32,
    "Transformers, as saved": as_saved,
    "padded on the left": padded_left,
    "chats, apply_chat_template": chat,
    "pipeline": pipeline,
    "saved again": saved_again,
    "base and adapter": adapter,
    "DeepSpeed-Chat": deepspeed_chat,
    "OpenRLHF": openrlhf,
    "TRL": trl,
    "CrossEncoder": cross_encoder,
    "SentenceTransformer": sentence_transformer,
}


def answer(saved: Saved, way: str) -> dict[str, Any]:
    """What a way gives: ``scores``, one or None for each text, or why there are none.

    Other keys: ``applies_mean``, the scores have the mean taken off; ``otherwise``, scores that are right where
    ``scores`` are not, for ``why_otherwise``, which is no fault; ``note``; ``problem``, what is wrong; ``not_verified``
    and ``not_its_way``, why nothing was tried.
    """
    try:
        return WAYS[way](saved)
    except NotVerified as reason:
        return {"not_verified": str(reason)}
    except NotItsWay as reason:
        return {"not_its_way": str(reason)}
    except UserError as error:
        return {"problem": str(error)}
    except ImportError as error:  # of a package that is there, and lacks one of its own
        return {"not_verified": first_line(error)}
    except Exception as error:  # whatever a folder that does not load raises
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return {"not_verified": f"too little host memory: {first_line(error)}"}
        return {"problem": f"{type(error).__name__}: {first_line(error)}"}


def main(question_file: str, answer_file: str) -> None:
    """Write what each of the question's ``ways`` gives, as soon as it is known."""
    quieten(False)
    question = json.loads(Path(question_file).read_text(encoding="utf-8"))
    texts = [Text(**each) for each in question["texts"]]
    with open(answer_file, "a", encoding="utf-8") as file:
        try:
            adapter = Path(question["adapter"])
            saved = Saved(Path(question["folder"]), texts, question["trust_remote_code"], adapter)
        except Exception as error:  # no config.json, or none that can be read
            saved, fault = None, f"{type(error).__name__}: {first_line(error)}"
        for way in question["ways"]:
            print(json.dumps({"begins": way}), file=file, flush=True)
            found = answer(saved, way) if saved else {"problem": fault}
            print(json.dumps({"way": way} | found), file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
