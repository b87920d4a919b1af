# SPDX-License-Identifier: Apache-2.0
"""What ``reward-model ensemble`` takes for many rows: time, and the memory of the process as it gets on.

python strengths.py                       two tiny models on 20,000 and 100,000 pairs of a few words
python strengths.py --rows 1000000 --stand_in   the models are loaded, and numbers are made up in place of scores
python strengths.py --heads 1 4

Memory is what Linux tells of the process while it runs: its own (RssAnon), which has to be there, and that of files
that are mapped (RssFile: libraries, the rows, what the models made of them), which the kernel takes back when it wants
to. Both are peaks, looked at ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from saved import save

WORDS = ["cat", "mat", "fish", "there", "sat", "other", "eats", "where"]
STAND_IN = """
import sys
import numpy as np
from reward_model.__main__ import main
from reward_model.serving.ensemble import Scoring

def differences(self, start, block):
    return np.sin(np.arange(start, start + len(block)))[:, None].repeat(self.heads, 1), [], 0

Scoring._differences = differences
sys.exit(main(sys.argv[1:]))
"""
PEAKS = ("RssAnon", "RssFile")
LOOKS = 0.1  # seconds
DRAWN_AT_ONCE = 10_000


def write_rows(path: Path, count: int) -> None:
    """Pairs of 2 to 7 words, and a prompt of two."""
    chance = np.random.default_rng(0)
    with path.open("w") as file:
        for first in range(0, count, DRAWN_AT_ONCE):
            words = chance.integers(len(WORDS), size=(DRAWN_AT_ONCE, 2, 7)).tolist()
            lengths = chance.integers(2, 8, (DRAWN_AT_ONCE, 2)).tolist()
            for number in range(first, min(first + DRAWN_AT_ONCE, count)):
                of_row = zip(words[number - first], lengths[number - first])
                chosen, rejected = (" ".join(WORDS[word] for word in each[:length]) for each, length in of_row)
                row = {"prompt": f"{WORDS[number % 5]} {number % 997} ", "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(row) + "\n")


def peaks_of(process: subprocess.Popen) -> dict[str, float]:
    """Of a process until it ends, in 10⁶ bytes."""
    found = dict.fromkeys(PEAKS, 0.0)
    while process.poll() is None:
        try:
            said = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        except OSError:  # it has ended
            break
        for name in PEAKS:
            found[name] = max(found[name], int(said.get(name, "0 kB").split()[0]) * 1.024e-3)
        time.sleep(LOOKS)
    return found


def measure(folder: Path, models: list[Path], count: int, stand_in: bool) -> str:
    """A line of the table."""
    data, output = folder / f"rows{count}.jsonl", folder / f"out{count}.jsonl"
    write_rows(data, count)
    words = [*map(str, models), "--data", str(data), "--output", str(output), "--device", "cpu", "--json"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with (
        (folder / "said").open("w") as said,
        subprocess.Popen(
            [sys.executable, *(["-c", STAND_IN] if stand_in else ["-m", "reward_model"]), "ensemble", *words],
            stdout=subprocess.DEVNULL, stderr=said, env=environment,
        ) as process,
    ):  # fmt: skip
        peaks = peaks_of(process)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit((folder / "said").read_text()[-3000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = data.stat().st_size / 1e6
    data.unlink()
    output.unlink()
    return (
        f"| {count:,} | {size:.0f} MB | {cpu:.0f} s | {time.monotonic() - begun:.0f} s | {peaks['RssAnon']:.0f} MB | "
        f"{peaks['RssFile']:.0f} MB |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--heads", type=int, nargs="+", default=[1, 1], help="of each model")
    parser.add_argument("--stand_in", action="store_true", help="no model scores: what is left is reading and writing")
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        models = []
        for number, heads in enumerate(options.heads):
            folder = Path(place, f"model{number}")
            folder.mkdir()
            models.append(save(folder, seed=number, **({"heads": heads} if heads > 1 else {})))
        print(
            "| rows | data | CPU time | wall time | own memory, peak | mapped files, peak |\n|---|---|---|---|---|---|"
        )
        for count in options.rows:
            print(measure(Path(place), models, count, options.stand_in), flush=True)


if __name__ == "__main__":
    main()
