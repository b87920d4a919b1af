# SPDX-License-Identifier: Apache-2.0
"""ckpt-chaos over main.py: a run is ended at every file that it makes, renames or removes, and started again.

    python chaos.py serve SOCKET                       forks main.py for whoever asks, its imports done; ends with stdin
    python chaos.py ask SOCKET FLAG...                 a run of main.py by that process, as `python main.py FLAG...` is
    python chaos.py matrix FOLDER [--points N] [--only WORD]   the table of tests/README.md; hours with all points
    python chaos.py flake FOLDER [--times 25]          the run without a fault, again and again: ends and bytes compared

ckpt-chaos (PyPI, MIT) starts the command anew for each crash and for each resume; a fork saves the 8 seconds of imports
that each of them would take. What it injects is the same: its audit hook is armed in the fork.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

MODES = ("before", "torn", "term", "unsynced")


def serve(place):
    """Fork a run for each request; a thread for each answers with its exit status."""
    import warm

    warm.preload()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen(8)
    print("ready", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    while True:
        connection, _ = listening.accept()
        request = json.loads(connection.makefile().readline())
        child = os.fork()
        if not child:
            listening.close()
            become(warm, request)
        threading.Thread(target=answer, args=(connection, child), daemon=True).start()


def become(warm, request):
    """In the child: armed as its environment says, then main.py."""
    values = request["environment"]
    os.environ.update({name: value for name, value in values.items() if name.startswith("CKPT_CHAOS_")})
    if values.get("CKPT_CHAOS_WATCH"):
        from ckpt_chaos.targets.common import arm_from_env

        arm_from_env(int(values.get("RANK", 0)), lazy=True)
    warm.become_main(request | {"processes": 1, "signals": [], "script": None, "page": True}, 0)


def answer(connection, child):
    _, status = os.waitpid(child, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    connection.close()


def ask(place, flags):
    """Have a run made, print what it prints, and end as it did."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        request = {"flags": flags, "environment": dict(os.environ), "output": folder}
        connection.sendall((json.dumps(request) + "\n").encode())
        status = int(connection.makefile().readline() or 1)
        for name in ("out0", "err0"):
            sys.stdout.write(Path(folder, name).read_text(errors="replace"))
    return status if status >= 0 else 128 - status


class Served:
    """A process that forks runs, for as long as this lasts."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.place = f"{self.folder.name}/socket"
        words = [sys.executable, __file__, "serve", self.place]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"
        return [sys.executable, __file__, "ask", self.place]

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(30)
        self.folder.cleanup()


def verdicts(command, flags, work, points, ranks=1, crash_rank=0, modes=MODES):
    """How many crash points had which verdict, and the lines of those that did not pass.

    Args:
        command: the words before main.py's flags.
        work: a new folder.
        points: to try at most, spread evenly over all there are.
    """
    from ckpt_chaos.byo import run_byo

    rows = run_byo(
        [*command, *map(str, flags), "--output_dir", "{out}"],
        None,
        Path(work),
        max_points=points,
        timeout=300,
        grace=8.0,
        result_file="{out}/model.safetensors",
        step_regex=r"(?:resumed from step|finished after) (\d+)",  # one that came to its end in time is finished
        checkpoint_glob="{out}/checkpoints/step-*",
        modes=modes,
        ranks=ranks,
        crash_rank=crash_rank,
    )
    return Counter(row.verdict for row in rows), [
        f"{row.label}: {row.verdict}" for row in rows if row.verdict != "PASS"
    ]


def flags_for(model, data, cache, ranks=1):
    """A run of six steps with a checkpoint after the third and the last."""
    fixed = ["--max_seq_len", 96, "--max_train_samples", 48, "--max_eval_samples", 16, "--learning_rate", 1e-3]
    fixed += ["--per_device_train_batch_size", 8 // ranks, "--save_interval", 3, "--keep_checkpoints", 9]
    paths = ["--model_name_or_path", model, "--data_path", data, "--data_output_path", cache]
    return [*paths, *fixed, "--dropout", 0.1]


MATRIX = [
    *((1, 0, f"--zero_stage {stage}") for stage in range(4)),
    *((2, rank, f"--zero_stage {stage}") for stage in range(4) for rank in (0, 1)),
    (1, 0, "--zero_stage 2 --dtype bf16 --lora_dim 4"),
]


def matrix(folder, points, only):
    from reward_model.data.demo import write_data, write_model

    folder = Path(folder)
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")
    with Served() as command:
        for ranks, crash_rank, more in MATRIX:
            name = f"ranks {ranks}, rank {crash_rank} ended, {more}"
            if only and only not in name:
                continue
            flags = [*flags_for(folder / "model", folder / "data", folder / "cache", ranks), *more.split()]
            work = Path(tempfile.mkdtemp(dir=folder)) / "work"
            counts, wrong = verdicts(command, flags, work, points, ranks, crash_rank)
            print(f"RESULT {name}: {dict(counts)}", *wrong, sep="\n  ", flush=True)


def flake(folder, times):
    """How many of so many runs without a fault did not end, or ended with other bytes than the first."""
    import hashlib

    from reward_model.data.demo import write_data, write_model

    folder, wrong, first = Path(folder), [], None
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")
    flags = [*flags_for(folder / "model", folder / "data", folder / "cache"), "--zero_stage", 2]
    with Served() as command:
        for number in range(times):
            out = folder / f"out{number}"
            done = subprocess.run(
                [*command, *map(str, flags), "--output_dir", str(out)], capture_output=True, text=True
            )
            if done.returncode:
                wrong.append(f"run {number} ended with {done.returncode}: {done.stdout[-500:]}")
                continue
            digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
            first = first or digest
            wrong += [] if digest == first else [f"run {number} has other bytes"]
    print(f"RESULT {times} runs without a fault, {len(wrong)} wrong", *wrong, sep="\n  ", flush=True)
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("serve", "ask", "matrix", "flake"))
    parser.add_argument("place")
    parser.add_argument("--points", type=int, default=10_000)
    parser.add_argument("--only", default="")
    parser.add_argument("--times", type=int, default=25)
    if sys.argv[1:2] == ["ask"]:
        return ask(sys.argv[2], sys.argv[3:])
    options = parser.parse_args()
    if options.action == "serve":
        return serve(options.place)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    if options.action == "flake":
        return flake(options.place, options.times)
    return matrix(options.place, options.points, options.only)


if __name__ == "__main__":
    sys.exit(main())
