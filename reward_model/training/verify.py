# SPDX-License-Identifier: Apache-2.0
"""What is saved is what was evaluated: a process of its own loads the folder, and scores held-out texts again.

Scores are compared within what rounding explains, ids and settings exactly.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import reward_model
from reward_model.batching.collate import collate
from reward_model.common.errors import first_line
from reward_model.common.logging import logger
from reward_model.data.comparisons import Comparison, Comparisons
from reward_model.data.encoding import Encoding, end_text, one_start
from reward_model.data.tokenizer import SpecialTokens
from reward_model.models.for_transformers_4 import write_old_keys
from reward_model.models.forward import ForwardPass
from reward_model.models.saving import DSCHAT_WEIGHTS, SCALE
from reward_model.models.scorer import SCORE_PAIRS, count, gathered, head_layer
from reward_model.training import fresh_load
from reward_model.training.texts import CHAT, written_chat

MOST_TEXTS, LEAST_TEXTS, MOST_WRITTEN = 32, 2, 8
BATCH = 2  # texts that the trainer scores at a time; any device that trains holds two
OPERATIONS = 3e13  # of the scoring on a CPU: a minute at half a teraflop a second; a 7 B model gets 2,100 tokens of it
PATIENCE = 900  # seconds; the other ranks wait, and DeepSpeed lets them wait for half an hour
HEADROOM = 1.5e9  # bytes of the process besides the weights
LAUNCHERS = re.compile(  # variables that would have the process join a run, or slow it down
    r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|CROSS|NODE)_\w+|MASTER_\w+|TORCHELASTIC_\w+|TORCH_NCCL_\w+|NCCL_\w+|GLOO_\w+|"
    r"(OMPI|PMI|PMIX|MV2|SLURM|SBATCH|SRUN|DS|DEEPSPEED|ACCELERATE|FSDP)_\w+|OMP_NUM_THREADS|KMP_\w+"
)


@dataclass(frozen=True)
class WrittenText:
    """A text as somebody would give it to the saved tokenizer, and what training made of it.

    text: The prompt and the response joined, or what the chat template wrote; of a pair the response alone.
    ids: Of the text as it was evaluated: closed, and cut from the left where it was too long.
    templated: Whether a chat template wrote the text, so that the tokenizer adds no special tokens.
    messages: The chat, which the saved template has to write as ``text``; None: the text itself is given.
    prompt: Of a pair, which the tokenizer is given beside ``text``; None: it is given one text.
    """

    text: str
    ids: list[int]
    templated: bool
    messages: list[dict] | None = None
    prompt: str | None = None


class Outcome(NamedTuple):
    """How it went, in lines of which one at most has words.

    differs: what differs. not_verified: why it could not be found out.
    """

    differs: str = ""
    not_verified: str = ""


@dataclass(frozen=True)
class Expected:
    """What the evaluated model says, for the saved one to say again.

    ids: Of each text. scores: Of each text, raw. tolerances: How far each score may be off. written: Texts for the
    tokenizer. settings: What ``config.json`` has to say of the scores. second: Of each text, the tokens of its second
    segment, 0 where it has one alone.
    """

    ids: list[list[int]]
    scores: list[float]
    tolerances: list[float]
    written: list[WrittenText] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    second: list[int] = field(default_factory=list)


def expect(
    forward: ForwardPass,
    rows: Comparisons | Sequence[Comparison],
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    written: Iterable[WrittenText] = (),
) -> Expected:
    """Score some held-out texts with the trainer's own forward pass, one in a row; every rank calls it.

    Args:
        written: Texts of the data as they were written; without any, texts are made from the ids of the rows.
    """
    scorer = forward.scorer
    texts = choose_texts(rows, sum(count(p) for p in scorer.parameters()))
    scores, products = _score(forward, texts)
    layers = getattr(scorer.config.get_text_config(), "num_hidden_layers", None) or 12
    return Expected(
        list(map(whole, texts)),
        scores.tolist(),
        tolerances(scores, products, next(scorer.parameters()).dtype, layers).tolist(),
        list(written)[:MOST_WRITTEN] or rewritten(texts[: MOST_WRITTEN // 2], tokenizer, special),
        {name: getattr(scorer.config, name) for name in (*SCALE, SCORE_PAIRS) if hasattr(scorer.config, name)},
        list(map(second_segment, texts)),
    )


def whole(text: Comparison) -> list[int]:
    """The ids of a text."""
    return [*text.prompt, *text.responses[0]]


def second_segment(text: Comparison) -> int:
    """How many of its tokens are the second segment of a pair; 0: it is one text."""
    return len(text.responses[0]) if text.two_segments else 0


@torch.no_grad()
def _score(forward: ForwardPass, chosen: Sequence[Comparison]) -> tuple[torch.Tensor, torch.Tensor]:
    """The score of each text, and √Σᵢ(wᵢhᵢ)² of the head's weights w and what comes in, h; (n,), on the host."""
    head = head_layer(forward.scorer)
    with gathered([head.weight]):
        weight = head.weight.detach().float().mean(0)  # of several heads the score is the mean
    came_in: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: came_in.append(inputs[0].detach()))
    forward.module.eval()
    scores, products = [], []
    try:
        for first in range(0, len(chosen), BATCH):
            texts = chosen[first : first + BATCH]
            batch = collate(texts, forward.layout).to(forward.device)
            came_in.clear()
            scores.append(forward(batch, batch.tokens.ends).float().cpu())
            sizes = (weight * came_in[-1].float()).norm(dim=-1)  # (n,), or (n, s) of a class that scores every token
            products.append(sizes.reshape(len(texts), -1).amax(1).cpu())
    finally:
        hook.remove()
    return torch.cat(scores), torch.cat(products)


def choose_texts(rows: Comparisons | Sequence[Comparison], parameters: int) -> list[Comparison]:
    """Whole texts from all over the rows, as many as a CPU scores soon, the shorter ones first.

    Args:
        parameters: Of the model; a forward pass is two operations for each of them and each token.
    """
    texts = []
    for number, i in enumerate(dict.fromkeys(np.linspace(0, len(rows) - 1, MOST_TEXTS).astype(int).tolist())):
        row = rows[i]
        texts.append(row.text(number % len(row.responses)))
    texts.sort(key=lambda text: text.tokens)
    tokens = np.cumsum([text.tokens for text in texts])
    return texts[: max(LEAST_TEXTS, int((2 * parameters * tokens <= OPERATIONS).sum()))]


def tolerances(scores: torch.Tensor, products: torch.Tensor, dtype: torch.dtype, layers: int) -> torch.Tensor:
    """How far two right computations of each score may lie apart, (n,).

    A score is Σᵢ wᵢhᵢ, and each hᵢ has been rounded in two residual additions a layer: by u · √(2 · layers) of its
    size, if they are independent, which moves the score by as much of √Σᵢ(wᵢhᵢ)². (In four small models that was 0.5
    to 1.2 times what bfloat16 did to their scores.) Eight times that, since the largest of many differences is looked
    at. Transformers multiplies the head in the dtype, and rounds the score itself. u is 2⁻⁸ for bfloat16, 2⁻¹¹ for
    float16, and 2⁻¹⁴ for float32, for devices that multiply it in fewer bits.

    Args:
        products: √Σᵢ(wᵢhᵢ)² of each text, (n,).

    >>> tolerances(torch.tensor([2.0]), torch.tensor([0.2]), torch.bfloat16, layers=32)
    tensor([0.0656])
    """
    unit = torch.finfo(dtype).eps / 2 if dtype in (torch.bfloat16, torch.float16) else 2.0**-14
    return unit * (8 * math.sqrt(2 * layers) * products + 2 * scores.abs()) + 1e-6


def rewritten(
    texts: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, special: SpecialTokens
) -> list[WrittenText]:
    """Texts that have the ids of these, or nearly so, with the ids that the tokenizer of the training gives them.

    As they are, and without special tokens, which the tokenizer adds itself, to a pair as to one text; and a chat,
    where there is a template.
    """

    def read(ids: list[int], is_whole: bool = False) -> str:
        return tokenizer.decode(ids, skip_special_tokens=not is_whole, clean_up_tokenization_spaces=False)

    made = [_written(read(whole(each), is_whole=True), True, tokenizer, special) for each in texts]
    for each in texts:
        prompt = read(each.prompt) if each.two_segments else None
        response = read(whole(each) if prompt is None else each.responses[0])
        made.append(_written(response, False, tokenizer, special, prompt))
    chat = written_chat(tokenizer)
    if chat is not None:
        made.append(WrittenText(chat, encoded(chat, True, tokenizer, special), templated=True, messages=CHAT))
    return made


def _written(text: str, templated: bool, tokenizer, special: SpecialTokens, prompt: str | None = None) -> WrittenText:
    return WrittenText(text, encoded(text, templated, tokenizer, special, prompt), templated, prompt=prompt)


def encoded(
    text: str,
    templated: bool,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    prompt: str | None = None,
) -> list[int]:
    """The ids of a text, or of a pair of a prompt and this text, as training makes them."""
    how = Encoding(tokenizer, special, pairs=prompt is not None)
    if prompt is not None:
        return next(how.paired([prompt], [text]))[0]
    return (how.written if templated else how.joined)([text])[0]


def _closed(ids: list[int], each: WrittenText, special: SpecialTokens) -> list[int]:
    """What a tokenizer gave a text, as training closes it; to a pair nothing is added."""
    return ids if each.templated or each.prompt is not None else end_text(one_start(ids, special), special)


def check(
    folder: Path,
    forms: Sequence[str],
    expected: Expected,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    trust_remote_code: bool = False,
) -> Outcome:
    """Ask a saved model in a process of its own; says how it went, unless something differs.

    Args:
        forms: The forms that were saved, ``hf``, ``dschat`` or both.
        tokenizer: Of the training.
        trust_remote_code: The model brings code of its own, which may run.
    """
    if lacking := lacking_memory(folder, len(forms)):
        logger.warning(f"not verified: {lacking}")
        return Outcome(not_verified=lacking)
    question = {
        "folder": str(folder.resolve()),
        "forms": list(forms),
        "ids": expected.ids,
        "second": expected.second,
        "written": [asdict(each) for each in expected.written],
        "settings": list(expected.settings),
        "trust_remote_code": trust_remote_code,
    }
    answer = ask(question)
    if why := answer.get("not_verified"):
        logger.warning(f"not verified: {why}")
        return Outcome(not_verified=why)
    if problem := difference(answer, expected, tokenizer, special):
        return Outcome(differs=problem)
    apart = max(np.abs(np.array(scores) - np.array(expected.scores)).max() for scores in answer["scores"].values())
    logger.info(
        f"verified: loaded afresh, the saved model scores {len(expected.ids)} held-out texts as the trained one "
        f"(differences up to {apart:.1g}; rounding explains {max(expected.tolerances):.1g})"
    )
    return Outcome()


def ask(question: dict[str, Any]) -> dict[str, Any]:
    """The answer of a new process (:mod:`reward_model.training.fresh_load`), or ``not_verified`` with the reason."""
    with tempfile.TemporaryDirectory() as place:
        files = [str(Path(place, name)) for name in ("question.json", "answer.json")]
        Path(files[0]).write_text(json.dumps(question), encoding="utf-8")
        words = [sys.executable, "-m", "reward_model.training.fresh_load", *files]
        try:
            done = subprocess.run(
                words,
                cwd=place,
                env=plain_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=PATIENCE,
                start_new_session=True,  # a signal to the run's whole group, a Ctrl-C, is not for this process
            )
        except subprocess.TimeoutExpired:
            return {"not_verified": f"loading and scoring took more than {PATIENCE // 60} minutes"}
        except OSError as error:
            return {"not_verified": f"no new process: {error.strerror}"}
        if not Path(files[1]).is_file():
            lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line and "%|" not in line]
            how = f"by signal {-done.returncode}" if done.returncode < 0 else f"with exit status {done.returncode}"
            said = f": {lines[-1][:300]}" if lines else ""
            return {"not_verified": f"the process that loads the model ended {how}{said}"}
        answer = json.loads(Path(files[1]).read_text(encoding="utf-8"))
    if "no_memory" in answer:
        return {"not_verified": f"too little host memory to load the model: {answer['no_memory']}"}
    return answer


def plain_environment() -> dict[str, str]:
    """This process's environment for one that needs no device, no network and no other ranks."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHERS.fullmatch(name)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    package = str(Path(reward_model.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    devices = dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"), "")
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    own = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(cores),
        "DS_ACCELERATOR": "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return kept | devices | offline | own


def lacking_memory(folder: Path, forms: int = 1, copies: float = 1.1) -> str:
    """Why a saved model cannot be loaded by another process beside this one; empty: it can.

    Args:
        forms: in the folder, of which one at a time is loaded.
        copies: of the weights that the process holds.
    """
    need = HEADROOM + copies * weights_of(folder) / forms
    free = free_memory()
    if free is None or free >= need:
        return ""
    return f"{free / 1e9:.1f} GB of host memory are free, loading takes {need / 1e9:.1f} GB"


def weights_of(folder: Path) -> int:
    """Bytes of the weights in a folder, in all forms."""
    files = [*folder.glob("*.safetensors"), folder / DSCHAT_WEIGHTS]
    return sum(file.stat().st_size for file in files if file.is_file())


def free_memory() -> int | None:
    """Bytes of host memory that a new process can have, by the kernel and by this one's cgroup; None: unknown."""
    free = []
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free += [1024 * int(found[1])] if found else []
    except OSError:
        return None
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(free) if free else None


def difference(
    answer: dict[str, Any], expected: Expected, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens
) -> str:
    """The first thing that a saved model says otherwise than the evaluated one, in a line; empty: nothing."""
    if problem := answer.get("problem"):
        return f"it does not load: {problem}"
    for name, value in expected.settings.items():
        if answer["settings"].get(name) != value:
            return f"{name} is {answer['settings'].get(name)} in config.json and was {value}"
    if problem := _other_text(expected.written, answer["texts"], answer["ids"], tokenizer, special):
        return problem
    for form, scores in answer["scores"].items():
        excess = np.abs(np.array(scores) - np.array(expected.scores)) - np.array(expected.tolerances)
        worst = int(np.argmax(np.where(np.isfinite(excess), excess, np.inf)))
        if not excess[worst] <= 0:  # NaN, too
            return (
                f"form {form} gives held-out text {worst + 1} of {len(scores)} the score {scores[worst]:.5g}, and the "
                f"trained model {expected.scores[worst]:.5g} (rounding explains {expected.tolerances[worst]:.2g})"
            )
    for i, score in enumerate(answer.get("piped", [])):
        if not abs(score - expected.scores[i]) <= expected.tolerances[i]:
            return (
                f"Transformers' pipeline gives held-out text {i + 1} {score:.5g}, and the trained model "
                f"{expected.scores[i]:.5g}: it does not take the score as it is"
            )
    return ""


def _other_text(
    written: Sequence[WrittenText],
    texts: Sequence[str],
    ids: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
) -> str:
    """The first text that a saved tokenizer writes or encodes otherwise than the training's; empty: none."""
    for number, (each, text, found) in enumerate(zip(written, texts, ids), 1):
        if each.messages is not None and tokenizer.apply_chat_template(each.messages, tokenize=False) != each.text:
            continue  # a template that writes the time has nothing to be compared with
        if each.messages is not None and text != each.text:
            return f"the saved chat template writes {_shown(text)}, and that of the training {_shown(each.text)}"
        if not _same_text(_closed(found, each, special), each.ids):
            return f"the saved tokenizer gives text {number} other ids than training had: {_shown(each.text)}"
    return ""


def rehearse(
    rows: Comparisons | Sequence[Comparison],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    special: SpecialTokens,
    trust_remote_code: bool = False,
) -> str:
    """Save config and tokenizer before anything is trained, and load the tokenizer again.

    Returns:
        Why they cannot be saved, or what is otherwise afterwards, in a line; empty: nothing.
    """
    written = rewritten(choose_texts(rows, parameters=1)[: MOST_WRITTEN // 2], tokenizer, special)
    with tempfile.TemporaryDirectory() as place:
        try:
            config.save_pretrained(place)
            tokenizer.save_pretrained(place)
            write_old_keys(Path(place))
            again = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
            texts, ids = fresh_load.encode([asdict(each) for each in written], again)
        except Exception as error:  # a tokenizer that has lost its vocabulary file, or whatever else its code raises
            return f"config or tokenizer cannot be saved and loaded: {type(error).__name__}: {first_line(error)}"
    return _other_text(written, texts, ids, tokenizer, special)


def _same_text(ids: list[int], evaluated: list[int]) -> bool:
    """Equal, or equal but for what was cut from the left to fit; a start token stays."""
    kept = len(evaluated) - 1
    return ids == evaluated or (len(ids) > len(evaluated) and kept > 0 and ids[-kept:] == evaluated[-kept:])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:50]} … {text[-25:]}")


def set_aside(folder: Path, names: Iterable[str]) -> Path:
    """Move what was saved to ``unverified/`` in its folder, so that nobody takes it for the model."""
    place = folder / "unverified"
    place.mkdir(exist_ok=True)
    for name in names:
        os.replace(folder / name, place / name)
    return place
