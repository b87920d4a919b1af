# SPDX-License-Identifier: Apache-2.0
"""A process that has imported what main.py imports, and forks a run whenever it is asked: seconds saved on each.

    python warm.py      reads requests, a JSON object a line, from standard input, and answers each with a line

A request has ``flags`` of main.py, ``environment``, ``processes``, ``port``, ``timeout`` in seconds, ``output``, a
folder for what each process prints, ``script``, which is run in place of main.py, or null, and ``page``, whether
``report.html`` is written. The answer is the exit status: of the first process that failed, as a launcher's.
The tests that are about starting a run use fresh processes; the rest has no reason to import torch again.
"""

import json
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
MAIN = str(TOP / "training_scripts" / "main.py")
GRACE = 10.0  # seconds for the other processes to end by themselves once one has failed


def preload():
    sys.path.insert(0, str(TOP))
    from reward_model.common.logging import hushed, quieten

    quieten(debug=False)
    with hushed(debug=False):
        import deepspeed  # noqa: F401
        import peft  # noqa: F401

        import reward_model.config.options
        import reward_model.training.fresh_load
        import reward_model.training.run  # noqa: F401


def ask_a_fork(question):
    """In place of ``verify.ask``: a fork loads what was saved, with the same code, and need not import it anew."""
    from reward_model.training import fresh_load, verify

    with tempfile.TemporaryDirectory() as place:
        files = [str(Path(place, name)) for name in ("question.json", "answer.json")]
        Path(files[0]).write_text(json.dumps(question), encoding="utf-8")
        child = os.fork()
        if not child:
            values = verify.plain_environment()
            os.environ.clear()
            os.environ.update(values)
            import torch
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            torch.set_num_threads(1)  # the threads of the process before have not come along
            unset_hf_deepspeed_config()
            fresh_load.main(*files)
            os._exit(0)
        os.waitpid(child, 0)
        return json.loads(Path(files[1]).read_text(encoding="utf-8"))


def send_signal_at(event):
    """Have this process get a signal at the end of a step, or in the middle of the evaluation after it."""
    from reward_model.evaluation import evaluate
    from reward_model.training.step_log import StepLog

    end_step, read_points, reached = StepLog.end_step, evaluate.read_points, []

    def ended(log, step, *rest):
        end_step(log, step, *rest)
        reached.append(step)
        if step == event["step"] and not event.get("in_evaluation"):
            os.kill(os.getpid(), getattr(signal, event["signal"]))

    def read(*arguments):
        if event.get("in_evaluation") and reached[-1:] == [event["step"]]:
            os.kill(os.getpid(), getattr(signal, event["signal"]))
        return read_points(*arguments)

    StepLog.end_step, evaluate.read_points = ended, read


def become_main(request, rank):
    """In the child: main.py with these flags, as ``python main.py`` or a launcher would start it."""
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["processes"] > 1:
        world = str(request["processes"])
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])})
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(f"{request['output']}/{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from reward_model.training import run, verify

    verify.ask = ask_a_fork
    if not request["page"]:
        run.write_report = lambda folder: None
    for each in request["signals"]:
        if each["rank"] == rank:
            send_signal_at(each)
    sys.argv = ["main.py", *request["flags"]]
    os.chdir(Path(MAIN).parent)
    status = 0
    try:
        runpy.run_path(request["script"] or MAIN, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def run(request):
    """Fork the processes of a run, and wait for them; its exit status."""
    children = {}
    for rank in range(request["processes"]):
        child = os.fork()
        if not child:
            become_main(request, rank)
        children[child] = rank
    deadline, failed = time.monotonic() + request["timeout"], 0
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            del children[child]
            status = os.waitstatus_to_exitcode(status)
            if status and not failed:
                failed, deadline = status, min(deadline, time.monotonic() + GRACE)
        elif time.monotonic() > deadline:
            failed = failed or -signal.SIGKILL
            for child in children:
                os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + GRACE
        else:
            time.sleep(0.02)
    return failed


def main():
    preload()
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
