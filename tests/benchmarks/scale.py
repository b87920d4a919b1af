# SPDX-License-Identifier: Apache-2.0
"""What the number of pairs costs: start-up, time per pair, memory.

python tests/benchmarks/scale.py --output FOLDER
python tests/benchmarks/scale.py --output FOLDER --sizes 1000 100000 --flags "--merge prompt"

For each number of pairs training_scripts/main.py starts twice on a tiny model, so that the second time the rows are
tokenized already, and is stopped after 60 steps. Start-up is from the first import to the first step, the evaluation of
8 pairs included; imports take the part of it that a run of one pair would wait for too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

import work

BATCH, STEPS, FIRST = 16, 60, 20  # pairs a step; steps, and those of them that are not timed
WORDS = 30  # of a prompt and of each answer
SIZES = {"vocabulary": 1024, "hidden": 32, "intermediate": 64, "layers": 1, "heads": 2}


def prepare(folder: Path, pairs: int) -> None:
    import numpy as np

    draw = work.Draw(SIZES["vocabulary"], 4 * WORDS)
    work.write_data(folder / "data", draw.pairs(np.full((pairs, 3), WORDS), pairs), draw)
    words = [sys.executable, str(Path(work.__file__)), str(folder / "model"), json.dumps(SIZES)]
    subprocess.run(words, check=True, capture_output=True)


def train(folder: Path, flags: list[str]) -> None:
    """Run main.py here, print what it took, and leave in the middle."""
    begin = time.perf_counter()
    top = Path(__file__).resolve().parent.parent.parent
    sys.path.insert(0, str(top))
    from reward_model.common.distributed import prepare_environment

    prepare_environment()
    from reward_model.training.step_log import StepLog

    imported = time.perf_counter()
    end_step, times = StepLog.end_step, []

    def stop(self, step, *others):
        end_step(self, step, *others)
        times.append((time.perf_counter(), time.process_time()))
        if step == STEPS:
            pairs = (STEPS - FIRST) * BATCH
            result = {
                "imports": imported - begin,
                "start": times[0][0] - begin,
                "cpu_ms_a_pair": 1e3 * (times[-1][1] - times[FIRST - 1][1]) / pairs,
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            print(json.dumps(result), flush=True)
            os._exit(0)

    StepLog.end_step = stop
    given = ["--model_name_or_path", folder / "model", "--data_path", folder / "data"]
    given += ["--data_output_path", folder / "cache", "--per_device_train_batch_size", BATCH]
    sys.argv = ["main.py", *map(str, given), *flags]
    runpy.run_path(str(top / "training_scripts" / "main.py"), run_name="__main__")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--flags", default="", help="more flags of main.py")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        return train(options.train, shlex.split(options.flags))
    print(f"{'pairs':>8}  {'rows':10} {'imports s':>9} {'start-up s':>10} {'CPU ms a pair':>13} {'peak MiB':>8}")
    for size in options.sizes:
        folder = options.output.resolve() / str(size)
        prepare(folder, size)
        own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets"), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, __file__, "--output", options.output, "--train", folder, f"--flags={options.flags}"]
        for rows in ("new", "tokenized"):
            done = subprocess.run(list(map(str, words)), env=os.environ | own, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            r = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{size:8,}  {rows:10} {r['imports']:9.1f} {r['start']:10.1f} {r['cpu_ms_a_pair']:13.2f} "
                f"{r['memory'] / 2**20:8,.0f}",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
