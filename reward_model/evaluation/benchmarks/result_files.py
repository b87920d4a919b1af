# SPDX-License-Identifier: Apache-2.0
"""Files of results in rewardbench's form, for its own tools to read.

``rewardbench`` 0.1.4 and 0.1.5 (``rewardbench/rewardbench.py``, ``scripts/run_rm.py``, ``scripts/run_v2.py``) write for
a model X, whose name may have a slash:

- X.json, X_outputs.jsonl and X_all.jsonl, of any set of pairs: the command ``rewardbench``, the last with --save_all,
- eval-set/X.json and eval-set-scores/X.json, of RewardBench and RewardBench 2, and pref-sets/ and pref-sets-scores/ of
  the prior sets: what the leaderboards read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from reward_model.common.errors import UserError
from reward_model.common.files import write_whole
from reward_model.data.rows import Texts
from reward_model.evaluation.benchmarks.forms import Benchmark, Question, expanded
from reward_model.evaluation.benchmarks.rewardbench import COUNTS, REWARDBENCH, results_of, subset_accuracies
from reward_model.evaluation.benchmarks.rewardbench2 import REWARDBENCH_2, best_of, metrics

MODEL_TYPE = "Seq. Classifier"  # rewardbench's word for a model that scores


@dataclass(frozen=True)
class ScoredPair:
    """A pair as the model read it, with its scores.

    metadata: what X_outputs.jsonl has beside them.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    metadata: dict

    @property
    def result(self) -> int:
        return results_of([(self.chosen_score, self.rejected_score)])[0]


def write_results(
    folder: Path,
    model: str,
    benchmark: Benchmark,
    questions: Sequence[Question],
    scores: Sequence[Sequence[float] | None],
    texts: Sequence[Texts | None] | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = "tokenizer",
) -> list[Path]:
    """Write a benchmark's scores as rewardbench would have.

    Args:
        scores: as :func:`reward_model.evaluation.benchmarks.measure` takes them. Questions without are left out.
        texts: each question as it was read, one text for each of its responses; without them, the answers alone.
        tokenizer: as X.json names it; the model's own unless given.
        chat_template: as the leaderboard's files name it: ``tokenizer`` where the tokenizer has one.

    Returns:
        the files.

    Raises:
        UserError: a question has other than two answers, and the benchmark is not RewardBench 2.
    """
    values = expanded(questions, scores)
    read = texts or [None] * len(questions)
    kept = [(asked, of, text) for asked, of, text in zip(questions, values, read, strict=True) if of]
    head = {"model": model, "model_type": MODEL_TYPE, "chat_template": chat_template}
    if benchmark is REWARDBENCH_2:
        return _write_rewardbench_2(folder, model, head, kept)
    if any(len(of) != 2 for _, of, _ in kept):
        raise UserError(f"rewardbench's files hold pairs, and {benchmark.name} has questions of other than two answers")
    pairs = [_pair(asked, of, text) for asked, of, text in kept]
    if benchmark is not REWARDBENCH:
        return write_pairs(folder, model, pairs, tokenizer) if pairs else []
    paths = []
    for place, is_core in (("eval-set", True), ("pref-sets", False)):
        rows = [i for i, (asked, _, _) in enumerate(kept) if (asked.subset in COUNTS) == is_core]
        if not rows:
            continue
        part = [pairs[i] for i in rows]
        both = [(pair.chosen_score, pair.rejected_score) for pair in part]
        found = subset_accuracies([kept[i][0] for i in rows], both)
        if is_core:
            paths += write_pairs(folder, model, part, tokenizer, subsets=found)
        paths += _write_set(folder, place, model, head, found, _columns(part))
    return paths


def write_pairs(
    folder: Path,
    model: str,
    pairs: Sequence[ScoredPair],
    tokenizer: str | None = None,
    chat_template: str | None = None,
    subsets: dict[str, float] | None = None,
) -> list[Path]:
    """Write X.json, X_outputs.jsonl and X_all.jsonl, those of the command ``rewardbench``.

    Args:
        chat_template: a name of FastChat's; None is the tokenizer's own.
        subsets: accuracy of each, which rewardbench gives for its own set only.
    """
    summary = {
        "accuracy": sum(pair.result for pair in pairs) / len(pairs),
        "num_prompts": len(pairs),
        "model": model,
        "ref_model": None,
        "tokenizer": tokenizer or model,
        "chat_template": chat_template,
        "extra_results": subsets,
    }
    outputs = [
        {
            "prompt": pair.prompt,
            "results": pair.result,
            "scores_chosen": pair.chosen_score,
            "scores_rejected": pair.rejected_score,
            "text_chosen": pair.chosen,
            "text_rejected": pair.rejected,
            **pair.metadata,
        }
        for pair in pairs
    ]
    every = [{"chosen": pair.chosen_score, "rejected": pair.rejected_score} for pair in pairs]
    return [
        _write(_path(folder, model, ".json"), json.dumps(summary)),
        _write(_path(folder, model, "_outputs.jsonl"), _lines(outputs)),
        _write(_path(folder, model, "_all.jsonl"), _lines(every)),
    ]


def _pair(asked: Question, scores: list[float], text: Texts | None) -> ScoredPair:
    """The pair of a question of two answers, whichever of them it holds right. Metadata are RewardBench's columns."""
    prompt, whole = _texts(asked, text)
    answers = [asked.row["responses"][place][-1]["content"] for place in asked.answers]
    i = asked.row["ranks"][asked.answers[0]]  # 0 where the first is right
    metadata = {"chosen": answers[i], "rejected": answers[1 - i]}
    metadata |= {name: asked.facts[name] for name in ("chosen_model", "rejected_model") if name in asked.facts}
    metadata |= {"subset": asked.subset, "id": int(asked.id) if asked.id.isdecimal() else asked.id}
    return ScoredPair(prompt, whole[i], whole[1 - i], scores[i], scores[1 - i], metadata)


def _texts(asked: Question, text: Texts | None) -> tuple[str, list[str]]:
    """The prompt, and the text of each of the benchmark's answers."""
    if text is not None:
        return text.prompt, [text.whole[place] for place in asked.answers]
    prompt = "\n".join(message["content"] for message in asked.row["prompt"])
    return prompt, [asked.row["responses"][place][-1]["content"] for place in asked.answers]


def _columns(pairs: list[ScoredPair]) -> dict[str, list]:
    return {
        "text_chosen": [pair.chosen for pair in pairs],
        "text_rejected": [pair.rejected for pair in pairs],
        "results": [pair.result for pair in pairs],
        "subset": [pair.metadata["subset"] for pair in pairs],
        "id": [pair.metadata["id"] for pair in pairs],
        "scores_chosen": [pair.chosen_score for pair in pairs],
        "scores_rejected": [pair.rejected_score for pair in pairs],
    }


def _write_rewardbench_2(folder: Path, model: str, head: dict, kept: list) -> list[Path]:
    """The leaderboard's two files of RewardBench 2.

    ``results`` of Ties are those of the best of n, as ``run_v2.py`` writes them: it means to empty them, and looks for
    a subset "ties" where the data have "Ties".
    """
    asked, scores = [question for question, _, _ in kept], [of for _, of, _ in kept]
    found = {name: value for name, value in metrics(asked, scores).items() if name != "score"}
    columns = {
        "text": [_texts(question, text)[1] for question, _, text in kept],
        "scores": scores,
        "results": [best_of(of) for of in scores],
        "subset": [question.subset for question in asked],
        "id": [question.id for question in asked],
        "num_correct": [question.facts["num_correct"] for question in asked],
    }
    return _write_set(folder, "eval-set", model, head, found, columns)


def _write_set(folder: Path, place: str, model: str, head: dict, subsets: dict, columns: dict) -> list[Path]:
    """The two files of a leaderboard: keys sorted, indented by four."""
    forms = ((place, subsets), (f"{place}-scores", columns))
    return [
        _write(_path(folder / name, model, ".json"), json.dumps(head | body, indent=4, sort_keys=True))
        for name, body in forms
    ]


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _path(folder: Path, model: str, ending: str) -> Path:
    """Where the results of a model go. A model that is a path stays below the folder."""
    path = PurePath(model)
    parts = [part for part in path.parts if part not in ("..", ".", path.anchor)] or ["model"]
    return folder.joinpath(*parts[:-1], parts[-1] + ending)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path
