# SPDX-License-Identifier: Apache-2.0
"""Load on a server of scores: answers a second, how long a request takes, what is lost or mixed up, and its memory.

python serving.py MODEL --answers 100000                  # ours: single texts and lists of eight answers
python serving.py MODEL --answers 4000 --openrlhf FOLDER  # ours, then OpenRLHF's server of a checkout, the same texts

Every reward is compared with that of ``RewardScorer.score``, which scores the text by itself. OpenRLHF's server runs as
it is but for two things: flash_attn and pylatexenc, which it imports and does not use here, are empty modules, and its
model computes in float32, as ours does. Clients are threads with a connection each, which they keep.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.machinery
import json
import os
import queue
import random
import runpy
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TOP = Path(__file__).resolve().parents[2]
WORDS = ("cat", "mat", "fish", "there", "sat", "other", "eats", "where", "question:", "answer:", "the", "on")
PER_PROMPT = 8  # answers
PROMPTS = 1_000  # at most, each with its answers, which come again and again
TOLERANCE = 1e-4
STUBS = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
    "pylatexenc": ("latex2text",),
}


class Asked(NamedTuple):
    """A request: where to, its body, and the rewards that it should bring."""

    path: str
    body: bytes
    expected: list[float]


class Load(NamedTuple):
    """What came of it.

    lost: answers that have no reward. wrong: whose reward is another. cpu: seconds of the server, all threads;
    seconds: by the clock, in which other work of the machine counts. memory: MB, as it went.
    """

    answers: int
    lost: int
    wrong: int
    seconds: float
    cpu: float
    median: float  # of a request
    slowest: float
    memory: list[float]

    def __str__(self) -> str:
        memory = " → ".join(
            f"{each:.0f}" for each in (self.memory[0], self.memory[len(self.memory) // 2], self.memory[-1])
        )
        return (
            f"{self.answers} answers in {self.seconds:.1f} s, {self.answers / self.seconds:.0f} a second, "
            f"{self.answers / self.cpu:.0f} a CPU second; a request "
            f"{1e3 * self.median:.1f} ms (median), {1e3 * self.slowest:.0f} ms (slowest); {self.lost} lost, "
            f"{self.wrong} wrong; memory {memory} MB"
        )


def texts(count: int, words: int, seed: int = 0) -> Iterator[tuple[str, list[str]]]:
    """So many prompts of up to so many words, with answers of up to half as many."""
    chance = random.Random(seed)

    def said(most: int) -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(2, most)))

    for _ in range(count):
        yield said(words), [f" {said(max(3, words // 2))}" for _ in range(PER_PROMPT)]


def requests(model: str, answers: int, lists: bool, words: int) -> list[Asked]:
    """Requests for so many answers, in random order.

    Args:
        lists: half of the answers come as lists of a prompt's answers, to /score; else each alone, to /get_reward.
    """
    from reward_model.inference import load

    reward = load(model)
    end = reward.tokenizer.eos_token or ""
    given = list(texts(min(PROMPTS, answers // PER_PROMPT), words))
    scores = iter(reward.score([p for p, found in given for _ in found], [r for _, found in given for r in found]))
    alone, whole = [], []
    for prompt, found in given:
        expected = [next(scores) for _ in found]
        whole.append(Asked("/score", _json({"prompt": prompt, "responses": found}), expected))
        for text, score in zip(found, expected):
            body = _json({"query": [prompt + text + end], "prompts": [prompt], "labels": [""]})
            alone.append(Asked("/get_reward", body, [score]))
    share = answers // (2 * PER_PROMPT) if lists else 0
    wanted = _repeated(whole, share) + _repeated(alone, answers - share * PER_PROMPT)
    random.Random(1).shuffle(wanted)
    return wanted


def _json(body: dict) -> bytes:
    return json.dumps(body).encode()


def _repeated(asked: list[Asked], count: int) -> list[Asked]:
    return (asked * (count // len(asked) + 1))[:count]


def load_on(port: int, asked: list[Asked], clients: int, process: int) -> Load:
    """Ask all of it, and compare."""
    todo: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    for each in asked:
        todo.put(each)
    lost, wrong, seconds, memory = [], [], [], [resident(process)]

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
        with contextlib.suppress(queue.Empty):
            while True:
                each = todo.get_nowait()
                begun = time.perf_counter()
                try:
                    connection.request("POST", each.path, each.body, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    body = json.loads(answer.read())
                    found = body["scores"] if answer.status == 200 else []
                except (OSError, http.client.HTTPException, ValueError):
                    connection.close()
                    found = []
                seconds.append(time.perf_counter() - begun)
                if len(found) != len(each.expected):
                    lost.append(len(each.expected))
                    continue
                wrong.append(sum(abs(a - b) > TOLERANCE for a, b in zip(found, each.expected)))

    begun, used = time.perf_counter(), cpu_seconds(process)
    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        memory.append(resident(process))
    took, used = time.perf_counter() - begun, cpu_seconds(process) - used
    seconds.sort()
    answers = sum(len(each.expected) for each in asked)
    return Load(answers, sum(lost), sum(wrong), took, used, seconds[len(seconds) // 2], seconds[-1], memory)


def cpu_seconds(process: int) -> float:
    """What a process has computed so far, on all cores together; 0: it is gone."""
    with contextlib.suppress(OSError):
        after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def resident(process: int) -> float:
    """The memory of a process, in 10⁶ bytes; 0: it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


@contextlib.contextmanager
def serving(words: list[str], port: int, log: Path) -> Iterator[int]:
    """A server's process, from when it answers on."""
    environment = os.environ | {"PYTHONPATH": f"{TOP}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.2)
            if process.poll() is not None:
                raise SystemExit(f"the server has ended: {log.read_text()[-2000:]}")
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def ours(model: str, asked: list[Asked], clients: int, log: Path) -> Load:
    """Load on ``reward-model serve``."""
    port = free_port()
    words = [sys.executable, "-m", "reward_model", "serve", model, "--port", str(port), "--device", "cpu"]
    with serving(words, port, log) as process:
        load_on(port, asked[:200], clients, process)  # what is loaded when it is first used
        return load_on(port, asked, clients, process)


def theirs(checkout: str, model: str, asked: list[Asked], clients: int, log: Path) -> Load:
    """Load on OpenRLHF's ``serve_rm``."""
    port = free_port()
    words = [sys.executable, __file__, model, "--openrlhf", checkout, "--be_openrlhf", str(port)]
    with serving(words, port, log) as process:
        load_on(port, asked[:200], clients, process)
        return load_on(port, asked, clients, process)


def be_openrlhf(checkout: str, model: str, port: int) -> None:
    """Become OpenRLHF's server."""
    sys.path.insert(0, checkout)
    for name, functions in STUBS.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function in functions:
            setattr(sys.modules[name], function, None)
    import openrlhf.utils.utils as utils
    import torch

    utils.convert_to_torch_dtype = lambda name: torch.float32
    flags = {"reward.model_name_or_path": model, "ds.attn_implementation": "sdpa", "host": "127.0.0.1", "port": port}
    sys.argv = ["serve_rm", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    runpy.run_module("openrlhf.cli.serve_rm", run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder that the trainer saved")
    parser.add_argument("--answers", type=int, default=4_000)
    parser.add_argument("--words", type=int, default=40, help="the most of a prompt; an answer has half as many")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--openrlhf", help="a checkout of OpenRLHF, whose server is asked after ours")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--logs", type=Path, default=Path("/tmp"))
    parser.add_argument("--be_openrlhf", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_openrlhf:
        be_openrlhf(options.openrlhf, options.model, options.be_openrlhf)
        return
    asked = requests(options.model, options.answers, not options.openrlhf, options.words)
    for number in range(options.rounds):
        print("ours:", ours(options.model, asked, options.clients, options.logs / f"ours{number}.log"), flush=True)
        if options.openrlhf:
            log = options.logs / f"openrlhf{number}.log"
            print("OpenRLHF:", theirs(options.openrlhf, options.model, asked, options.clients, log), flush=True)


if __name__ == "__main__":
    main()
