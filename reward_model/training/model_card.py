# SPDX-License-Identifier: Apache-2.0
"""The model card of what is saved: ``README.md`` with the front matter that the hub reads.

Of the user's machine it names nothing but the last component of a path.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedTokenizerBase

from reward_model.common.errors import printable
from reward_model.common.files import write_whole
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.config.settings import Settings
from reward_model.data.comparisons import Comparisons
from reward_model.data.sources import amount_of
from reward_model.data.weakest import Weakest
from reward_model.models.saving import DSCHAT_WEIGHTS, TAGS
from reward_model.models.st_modules import MODULES
from reward_model.training.data import Data
from reward_model.training.naming import kind_of_texts
from reward_model.training.texts import end_token

NAME, BESIDE = "README.md", "MODEL_CARD.md"  # the second where the first is the user's own
MARK = "<!-- written by dschat-reward; a card with another hash than this was changed, and is kept: "
METRICS = {  # of metrics.jsonl → their heading
    "pairs": "pairs",
    "accuracy": "accuracy",
    "longer_wins_accuracy": "accuracy of always the longer answer",
    "loss": "logistic loss",
    "gap_mean": "mean gap",
    "calibration_error": "calibration error",
    "length_correlation": "correlation of score and length",
    "rated": "scored answers",
    "pearson": "Pearson's correlation with the targets",
    "label_accuracy": "right labels",
}
SETTINGS = (  # of run.json, those that matter to who reads a card
    *("loss", "loss_weight", "loss_level", "margin", "margin_scale", "pair_weight", "label_smoothing"),
    *("score_penalty", "score_penalty_weight", "contrastive_weight", "contrastive", "contrastive_temperature"),
    *("sft_weight", "length_penalty", "flip_share", "drop_share", "heads", "head_anchor"),
    *("learning_rate", "head_learning_rate", "lora_dim", "lora_alpha"),
    *("lora_learning_rate", "meta_rate", "meta_batch_size"),
    *("lora_bits", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("world_size", "lr_scheduler_type", "warmup_ratio", "num_warmup_steps", "weight_decay", "max_seq_len", "merge"),
    *("pooling", "pair_encoding", "dropout", "chat", "dtype", "zero_stage", "offload", "optim", "keep_best", "seed"),
)

BELONGS_TO = {  # setting → the one without which it says nothing
    **dict.fromkeys(("lora_alpha", "lora_learning_rate", "lora_bits"), "lora_dim"),
    "score_penalty_weight": "score_penalty",
    **dict.fromkeys(("meta_rate", "meta_batch_size"), "meta_data"),
    **dict.fromkeys(("contrastive", "contrastive_temperature"), "contrastive_weight"),
}


@dataclass(frozen=True)
class Trained:
    """What a card tells of a training.

    run: what ``run.json`` says. sets: name of an evaluation set → metrics. step: of the weights. evaluated: the step
    after which the metrics were found. health: what :meth:`reward_model.training.health.Health.state` gives. scale:
    what ``config.json`` says of the scores. naming: what it says of the model, as :mod:`.naming` writes it.
    not_verified: why the saved model was not compared with the trained one; empty: it was, and scores as that did.
    """

    run: dict[str, Any]
    sets: dict[str, dict[str, Any]]
    step: int
    evaluated: int
    health: dict[str, Any]
    scale: dict[str, Any]
    naming: dict[str, Any] = field(default_factory=dict)
    not_verified: str = ""


def where_from(settings: Settings, data: Data) -> dict[str, Any]:
    """What a card says of data and base model, found while the paths are there: for ``run.json``."""
    model = settings.model.model_name_or_path
    held_out = [path for paths in settings.data.eval_sets.values() for path in paths]
    entries = dict.fromkeys(amount_of(entry)[0] for entry in (*settings.data.data_path, *held_out))
    on_hub = [entry for entry in entries if not os.path.exists(entry) and entry != "local/jsonfile"]
    return {
        "base_model": shown(model),
        "base_model_on_hub": not os.path.exists(model),
        "datasets": ["/".join(entry.split("/")[:2]) for entry in on_hub],
        "train": _rows_of(data.train),
        "evaluation": {name: _rows_of(rows) for name, rows in data.evaluation.items()},
        "texts": kind_of_texts(data.tokenizer, data.train, settings.data.chat),
        **({"weakest": data.weakest.to_json()} if data.weakest.pairs else {}),
    }


def _rows_of(rows: Comparisons) -> dict[str, int]:
    """Where rows are of → how many."""
    found: dict[str, int] = {}
    counts = np.bincount(rows.origins.sources, minlength=len(rows.origins.names)).tolist()
    for name, count in zip(rows.origins.names, counts):
        found[shown(name)] = found.get(shown(name), 0) + count
    return found


def shown(name: str) -> str:
    """A path without the folders above it; a name of the hub as it is.

    >>> shown("/home/me/secret/train.jsonl"), shown("owner/data, split train")
    ('train.jsonl', 'owner/data, split train')
    """
    path, comma, split = name.partition(", split ")
    is_path = os.path.exists(path) or path.startswith((".", "/", "~"))
    return f"{Path(path).resolve().name if is_path else path}{comma}{split}"


def card_of(name: str, files: Sequence[str], tokenizer: PreTrainedTokenizerBase, trained: Trained) -> str:
    """The text of a card.

    Args:
        name: of the model, or of its repository.
        files: that were saved, which tell the form.
    """
    run, origin = trained.run, trained.run.get("data", {})
    hub = origin.get("base_model") if origin.get("base_model_on_hub") else None
    front = ModelCardData(
        base_model=hub,
        datasets=origin.get("datasets") or None,
        eval_results=_results(name, origin, trained.sets),
        library_name="sentence-transformers" if MODULES in files else "transformers",
        metrics=["accuracy"] if any("accuracy" in each for each in trained.sets.values()) else None,
        model_name=name,
        pipeline_tag="text-classification",
        tags=[*TAGS, "dschat-reward"],
    )
    base = origin.get("base_model", "a pretrained model")
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}",
        "A reward model: it gives a text, a prompt with its answer, one score, of which a higher one is better. It was "
        f"trained from {_code(base)} with dschat-reward; these are the weights of step {trained.step}.",
        "## Held-out metrics",
        *(
            []
            if trained.evaluated == trained.step
            else [f"Found after step {trained.evaluated}, not with these weights."]
        ),
        _metrics(trained.sets),
        *(["## What it is", _table(("field", "value"), _named(trained.naming))] if trained.naming else []),
        "## How to score",
        *_doubts(trained),
        *_scoring(name, files, tokenizer, trained),
        "## Data",
        _data(origin),
        "## Training",
        _table(("setting", "value"), [(each, _value(run[each])) for each in SETTINGS if _is_told(run, each)]),
    ]
    if warnings := _warnings(trained.health):
        parts += ["## Warnings of the run", "\n".join(f"- {printable(line)}" for line in warnings)]
    versions = [(package, version) for package, version in run.get("versions", {}).items()]
    parts += ["## Versions", _table(("package", "version"), versions)]
    return signed("\n\n".join(parts) + "\n")


def _doubts(trained: Trained) -> list[str]:
    """What the reader should know before going by the scores."""
    if not trained.not_verified:
        return []
    return [
        f"It was not verified that the saved model scores as the trained one did: {printable(trained.not_verified)}."
    ]


def _results(name: str, origin: dict[str, Any], sets: dict[str, dict[str, Any]]) -> list[EvalResult] | None:
    """The accuracies, as the hub's model index has them; None: there are no pairs."""
    found = []
    for set_name, metrics in sets.items():
        if "accuracy" not in metrics:
            continue
        sources = origin.get("evaluation", {}).get(set_name, {})
        hub = [each for each in origin.get("datasets", []) if any(source.startswith(each) for source in sources)]
        found.append(
            EvalResult(
                task_type="text-classification",
                task_name="Preference pairs",
                dataset_type=hub[0] if len(hub) == 1 else "preference-pairs",
                dataset_name=set_name or ", ".join(sources) or "held-out pairs",
                metric_type="accuracy",
                metric_name="Pairs in the right order",
                metric_value=round(metrics["accuracy"], 4),
            )
        )
    return found or None


def _metrics(sets: dict[str, dict[str, Any]]) -> str:
    names = [name for name in METRICS if any(name in metrics for metrics in sets.values())]
    rows = [
        (_code(set_name) if set_name else "held out", *(_number(metrics.get(name)) for name in names))
        for set_name, metrics in sets.items()
    ]
    return _table(("rows", *(METRICS[name] for name in names)), rows)


def _scoring(name: str, files: Sequence[str], tokenizer: PreTrainedTokenizerBase, trained: Trained) -> list[str]:
    """How to score, by Transformers or Sentence-Transformers where they load the form, and by ours; chats, too."""
    is_dschat = DSCHAT_WEIGHTS in files and not any(each.endswith(".safetensors") for each in files)
    template = bool(tokenizer.chat_template)
    is_pairs = bool((trained.run | trained.naming).get("pair_encoding"))
    closes = "" if is_pairs else _closing(tokenizer, trained.run.get("special", {}))
    asked, answer = '"2 + 2 ="', '"4"' if is_pairs else '" 4"'
    chat = '[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]'
    parts = []
    if MODULES in files:
        lines = [
            "from sentence_transformers import SentenceTransformer",
            "",
            f"model = SentenceTransformer({name!r})",
            f"score = model.encode({f'({asked}, {answer})' if is_pairs else asked + ' + ' + answer + closes})[0]",
        ]
        parts.append(_python(lines))
    elif not is_dschat:
        text = f"{asked} + {answer}{closes}  # a prompt and its answer{', closed' if closes else ''}"
        call = f'tokenizer({f"{asked}, {answer}" if is_pairs else "text"}, return_tensors="pt")'
        lines = [
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            f"model = AutoModelForSequenceClassification.from_pretrained({name!r})",
            *([] if is_pairs else [f"text = {text}"]),
            f"score = model(**{call}).logits[0, 0]",
        ]
        if template and not is_pairs:
            lines += [
                "",
                f"chat = {chat}",
                "text = tokenizer.apply_chat_template(chat, tokenize=False)",
                'score = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]',
            ]
        parts.append(_python(lines))
    lines = [
        "from reward_model.inference import load  # dschat-reward",
        "",
        f"reward = load({name!r})  # a folder on this disk",
        f"reward.score([{asked}], [{answer}])",
        *([f"reward.score_chats([{chat}])"] if template else []),
    ]
    parts.append(_python(lines))
    if "score_mean" in trained.scale:
        parts.append(
            "The head was scaled to scores of standard deviation 1. `config.json` has their mean, "
            f"{trained.scale['score_mean']:.4f}. {applied_by(trained.scale['score_mean'], MODULES in files)} "
            "The metrics above are of the scores before."
        )
    if heads := trained.scale.get("score_heads"):
        parts.append(
            f"The score is the mean of {heads} heads, and so is the head in the weights. `heads/heads.safetensors` has "
            "all of them, by which `reward-model score` and `serve` give the standard deviation u of each score, and "
            f"`lower`, r − β·u with β = {trained.scale.get('score_beta', 1.0):g} (`score_beta` in `config.json`), "
            "or with that of `--beta`."
        )
    if "score_thresholds" in trained.scale:
        parts.append("`reward.grades(scores)` gives the grades that the model was trained on.")
    return parts


def _named(naming: dict[str, Any]) -> list[tuple[str, str]]:
    """What ``config.json`` says of the model, with the function that others apply to a score: none."""
    return [(name, _value(value)) for name, value in (naming | {"function_to_apply": "none"}).items()]


def applied_by(mean: float, is_modules: bool) -> str:
    """Who subtracts the mean of a normalized model, in sentences.

    Args:
        is_modules: the model is saved as Sentence-Transformers' modules, whose dense layer has the mean as its bias.
    """
    if is_modules:
        return "`reward_model.inference` subtracts it, and so do SentenceTransformer and vLLM's `embed`, by a bias."
    return (
        "`reward_model.inference` subtracts it. Transformers, its pipeline, CrossEncoder, TRL and SGLang do not. vLLM "
        f"does with `--pooler-config '{{\"logit_mean\": {mean:.6g}}}'`, and OpenRLHF with `normalize_reward` once "
        "`reward-model export --to openrlhf` has written it under its names, though not under Transformers 5, where it "
        "takes off something else."
    )


def _closing(tokenizer: PreTrainedTokenizerBase, special: dict[str, Any]) -> str:
    """Python that closes a text for a tokenizer which does not close it itself; empty: it does."""
    end = end_token(tokenizer, special.get("end"))
    if end is None:
        return ""
    return " + tokenizer.eos_token" if end == tokenizer.eos_token else f" + {end!r}"


def _data(origin: dict[str, Any]) -> str:
    rows = [("training", _code(name), count) for name, count in origin.get("train", {}).items()]
    for set_name, sources in origin.get("evaluation", {}).items():
        use = f"held out, {_code(set_name)}" if set_name else "held out"
        rows += [(use, _code(name), count) for name, count in sources.items()]
    said = [f"`{line.replace(':', '`:', 1)}." for line in Weakest(**origin.get("weakest", {})).lines()]
    return "\n\n".join([_table(("used for", "source", "rows"), rows), *said])


def _warnings(health: dict[str, Any]) -> list[str]:
    bad = health["bad_steps"]["count"]
    skipped = [f"{counted(bad, 'step')} skipped for a loss or gradient that was not finite"] if bad else []
    return [alarm["message"] for alarm in health["alarms"]] + skipped


def _is_told(run: dict[str, Any], name: str) -> bool:
    """Whether a setting is not off, and says something."""
    is_on = run.get(name) not in (None, "", 0, 0.0, False, [])
    return is_on and (name not in BELONGS_TO or _is_told(run, BELONGS_TO[name]))


def _value(value: Any) -> str:
    return ", ".join(map(_value, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', '')}`"


def _table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _python(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def signed(text: str) -> str:
    """A card with a mark by which :func:`is_ours` knows that nobody has changed it."""
    return f"{text}\n{MARK}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_ours(path: Path) -> bool:
    """Whether a file is a card as it was written."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    text, mark, _ = content.rpartition("\n" + MARK)
    return bool(mark) and signed(text) == content


def write_card(folder: Path, text: str) -> None:
    """Write a card into a folder; a ``README.md`` of the user's stays, and the card then lies beside it."""
    try:
        for name in (NAME, BESIDE):
            path = folder / name
            if not path.exists() or is_ours(path):
                write_whole(path, text)
                return
            logger.warning(f"{path} is yours, and stays as it is" + (f"; see {BESIDE}" if name == NAME else ""))
    except OSError as error:
        logger.warning(f"{path}: {error.strerror}; the model is complete without its card")
