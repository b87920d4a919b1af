# SPDX-License-Identifier: Apache-2.0
"""Does a saved model score the same everywhere: a line for each way in which others score with it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reward_model.common.errors import UserError, first_line
from reward_model.common.logging import logger
from reward_model.common.words import counted
from reward_model.config.model_folder import require_plausible_folder
from reward_model.config.options import read_run
from reward_model.config.verification import VerifyConfig
from reward_model.data.tokenizer import load_tokenizer
from reward_model.models.adapters import is_adapter, merged_before
from reward_model.models.saved_forms import form_of
from reward_model.training import by_keys
from reward_model.training import verify as guard
from reward_model.training.texts import Text, budgeted, fitting, made_up, texts_of
from reward_model.training.ways import WAYS

REFERENCE = next(iter(WAYS))
COPIES = 3.5  # of the weights: ours, and another one in float32 beside it
Status = Literal["reference", "same", "differs", "told", "not for it", "not verified"]


@dataclass(frozen=True)
class Line:
    """What came of one way.

    way: in which others score. status: ``told`` is something to know that is no fault; ``not for it``, a way that does
    not lead to such a model. note: for people. largest: the largest difference from our evaluation. explained: what
    rounding explains of that text's. texts: that were compared.
    """

    way: str
    status: Status
    note: str = ""
    largest: float | None = None
    explained: float | None = None
    texts: int = 0

    def __str__(self) -> str:
        parts = [self.note] if self.note else []
        if self.largest is not None:
            parts.insert(0, f"up to {self.largest:.1g} apart; rounding explains {self.explained:.1g}")
        return f"{self.way:28}{self.status:14}{'; '.join(parts)}".rstrip()


@dataclass(frozen=True)
class Verification:
    """What was found of a saved model. folder: as it was given. texts: how many were scored."""

    folder: str
    texts: int
    lines: list[Line] = field(default_factory=list)

    @property
    def is_same(self) -> bool:
        """Whether no way gives other scores; what was not verified is none that does."""
        return not any(line.status == "differs" for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "folder": self.folder,
            "texts": self.texts,
            "same": self.is_same,
            "lines": list(map(asdict, self.lines)),
        }


def verify(folder: str | Path, config: VerifyConfig | None = None) -> Verification:
    """Score some texts with a saved model in every way in which others would, each in a process of its own.

    Args:
        folder: a model, or an adapter beside the model that has it merged.

    Raises:
        UserError: no model there, or no text to verify it by.
    """
    config = config or VerifyConfig()
    place = _place(Path(folder), config.trust_remote_code)
    values = json.loads((place / "config.json").read_text(encoding="utf-8"))
    texts = _texts(place, values, config)
    if lacking := guard.lacking_memory(place, copies=COPIES):
        return Verification(str(folder), len(texts), [Line(way, "not verified", lacking) for way in WAYS])
    answers = dict(ask(place, texts, list(WAYS), config.trust_remote_code))
    lines = list(_lines(answers))
    form = form_of(place, "hf") or form_of(place)
    for name, would in (("vLLM, by its keys", by_keys.vllm), ("SGLang, by its keys", by_keys.sglang)):
        said, is_right = would(values, form)
        lines.append(Line(name, "told" if is_right else "differs", said))
    if mean := _mean_line(values, form):
        lines.append(mean)
    return Verification(str(folder), len(texts), lines)


def _place(folder: Path, trust_remote_code: bool) -> Path:
    """The folder of the model.

    Raises:
        UserError: it is not there.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if is_adapter(str(folder)):
        above = merged_before(str(folder))
        if not above:
            raise UserError(f"{folder} is an adapter alone: reward-model export merges it, and verifies the result")
        logger.info(f"{folder} is an adapter: verifying {above}, where it is merged, and it beside its base")
        folder = Path(above)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: there is no config.json in it")
    require_plausible_folder(folder, trust_remote_code)
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from error
    return folder


def _texts(place: Path, values: dict[str, Any], config: VerifyConfig) -> list[Text]:
    """Rows of the data, with chats of ours beside them, or texts of ours; as many as a CPU scores soon."""
    tokenizer = load_tokenizer(str(place), trust_remote_code=config.trust_remote_code)
    longest = longest_of(values, tokenizer)
    texts = made_up(tokenizer, longest)
    if config.data:
        named = values.get("reward_model") or {}
        is_chat = bool(tokenizer.chat_template) and bool(read_run(place / "run.json").get("chat"))
        is_chat = is_chat or (bool(tokenizer.chat_template) and named.get("texts") == "chat")
        rows = texts_of(config.data, tokenizer, is_chat, longest)
        texts = rows + [text for text in texts if text.messages]
    parameters = guard.weights_of(place) // (2 if values.get("dtype", values.get("torch_dtype")) != "float32" else 4)
    kept = budgeted(fitting(texts, tokenizer, longest), parameters, guard.OPERATIONS)
    if len(kept) < len(texts):
        logger.info(
            f"{len(kept)} of {counted(len(texts), 'text')}, the shortest, as a CPU is slow with so large a model"
        )
    return kept


def longest_of(values: dict[str, Any], tokenizer) -> int | None:
    """Tokens that a model takes by its ``config.json`` and tokenizer; None: neither says."""
    inner = values.get("text_config")
    values = values | inner if isinstance(inner, dict) else values
    positions = values.get("max_position_embeddings") or values.get("n_positions") or 0
    if str(values.get("model_type")) in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # they number positions from after the pad's id
    limits = (positions, tokenizer.model_max_length)
    return min((int(limit) for limit in limits if 0 < limit < 10**9), default=None)


def ask(
    folder: Path,
    texts: Sequence[Text],
    ways: list[str],
    trust_remote_code: bool = False,
    adapter: Path | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way and what it gives; a process that ends in the middle of one costs that one alone.

    Args:
        adapter: beside its base; None: that in the folder.
    """
    left = list(ways)
    question = {
        "folder": str(folder.resolve()),
        "texts": list(map(asdict, texts)),
        "trust_remote_code": trust_remote_code,
        "adapter": str((adapter or folder / "adapter").resolve()),
    }
    while left:
        found = _ask_once(question | {"ways": left}, left)
        for way in found:
            left.remove(way)
        yield from found.items()


def _ask_once(content: dict[str, Any], ways: list[str]) -> dict[str, dict[str, Any]]:
    """What a new process gives until it ends; the way in which it ended is among them."""
    with tempfile.TemporaryDirectory() as place:
        question, answer = Path(place, "question.json"), Path(place, "answer.jsonl")
        question.write_text(json.dumps(content), encoding="utf-8")
        answer.touch()
        words = [sys.executable, "-m", "reward_model.training.ways", str(question), str(answer)]
        try:
            done = subprocess.run(
                words,
                cwd=place,
                env=guard.plain_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=guard.PATIENCE,
                start_new_session=True,
            )
            status = done.returncode
            said = [line for line in done.stderr.decode(errors="replace").splitlines() if line and "%|" not in line]
            how = f"by signal {-status}" if status < 0 else f"with exit status {status}"
            why = f"its process ended {how}" + (f": {said[-1][:300]}" if said and status > 0 else "")
        except subprocess.TimeoutExpired:
            why = f"it took more than {guard.PATIENCE // 60} minutes"
        except OSError as error:
            why = f"no new process: {error.strerror}"
        records = [json.loads(line) for line in answer.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    found = {record.pop("way"): record for record in records if "way" in record}
    if len(found) < len(ways):
        begun = [record["begins"] for record in records if "begins" in record]
        unfinished = begun[-1:] if begun and begun[-1] not in found else []
        for way in unfinished or [way for way in ways if way not in found]:
            found[way] = {"not_verified": why}
    return found


def verify_adapter(merged: Path, adapter: Path, texts: Sequence[Text], trust_remote_code: bool = False) -> Line:
    """An adapter beside its base, compared with the model that has it merged."""
    ways = [REFERENCE, "base and adapter"]
    return list(_lines(dict(ask(merged, texts, ways, trust_remote_code, adapter))))[1]


def _lines(answers: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """A line for each way, those that do not lead to such a model told as such."""
    reference = answers[REFERENCE]
    for way, found in answers.items():
        if why := found.get("not_verified"):
            yield Line(way, "not verified", why)
        elif why := found.get("not_its_way"):
            yield Line(way, "not for it", why)
        elif why := found.get("problem"):
            yield Line(way, "differs", why)
        elif way == REFERENCE:
            is_finite = bool(np.isfinite(found["scores"]).all())
            note = f"{counted(len(found['scores']), 'text')}; {found['note']}"
            yield Line(way, "reference" if is_finite else "differs", note if is_finite else "a score is not finite")
        elif "scores" not in found:
            yield Line(way, "same", found.get("note", ""))
        elif "scores" not in reference:
            yield Line(way, "not verified", "our evaluation gave nothing to compare with")
        else:
            yield compared(way, found, reference)


def compared(way: str, found: dict[str, Any], reference: dict[str, Any]) -> Line:
    """How far the scores of a way are from the reference, and whether rounding explains it."""
    mean = reference["mean"] if found.get("applies_mean") else 0.0
    note = found.get("note", "")
    worst, place, count = _apart(found["scores"], reference, mean)
    explained = reference["tolerances"][place]
    line = Line(way, "same", note, worst, explained, count)
    if worst <= explained:
        return line
    given, expected = found["scores"][place], reference["scores"][place] - mean
    said = f"text {place + 1} of {len(found['scores'])} gets {given:.5g}, and {expected:.5g} here"
    if "otherwise" in found:
        other, at, _ = _apart(found["otherwise"], reference, mean)
        if other <= reference["tolerances"][at]:
            return Line(way, "told", f"{found['why_otherwise']} (with position_ids the same)", worst, explained, count)
    return Line(way, "differs", "; ".join(filter(None, (said, note))), worst, explained, count)


def _apart(scores: Sequence[float | None], reference: dict[str, Any], mean: float) -> tuple[float, int, int]:
    """The difference that exceeds its tolerance by most, its place; how many there are; NaN is infinite."""
    differences = np.array(
        [
            np.nan if score is None else abs(score - (expected - mean))
            for score, expected in zip(scores, reference["scores"], strict=True)
        ]
    )
    given = [i for i, score in enumerate(scores) if score is not None]
    differences[given] = np.where(np.isfinite(differences[given]), differences[given], np.inf)
    excess = differences[given] - np.array(reference["tolerances"])[given]
    place = given[int(np.argmax(excess))]
    return float(differences[place]), place, len(given)


def _mean_line(values: dict[str, Any], form: str | None) -> Line | None:
    """Who subtracts the mean of a normalized model; None: it has none."""
    mean = values.get("score_mean")
    if mean is None:
        return None
    if form == "modules":
        who = "reward_model.inference, SentenceTransformer and vLLM's embed subtract it"
    elif values.get("value_head_prefix") and values.get("mean") == mean:
        who = (
            "reward_model.inference subtracts it, and OpenRLHF's normalize_reward, but not under Transformers 5; "
            "Transformers, TRL, CrossEncoder do not"
        )
    else:
        who = "reward_model.inference alone subtracts it; Transformers, its pipeline, TRL, CrossEncoder do not"
    return Line("mean of the scores", "told", f"{mean:.6g}; {who}")
