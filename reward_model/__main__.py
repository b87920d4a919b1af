# SPDX-License-Identifier: Apache-2.0
"""The commands of the package: ``reward-model plan …``, or ``python -m reward_model plan …``."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys

from reward_model.common.errors import Ended, UserError, not_installed
from reward_model.common.logging import quieten

COMMANDS = {
    "train": ("reward_model.commands.train", "train a reward model: what training_scripts/main.py does"),
    "export": ("reward_model.commands.export", "a model, adapter or checkpoint in the form that another program reads"),
    "verify": (
        "reward_model.commands.verify",
        "does a saved model score the same everywhere, each way a line",
    ),
    "evaluate": ("reward_model.commands.evaluate", "how right models are on some data, how sure, and what scores mean"),
    "score": ("reward_model.commands.score", "scores of a file or of standard input, one line of JSON a row"),
    "ensemble": (
        "reward_model.commands.ensemble",
        "how strongly several models prefer the chosen answers, written beside the rows",
    ),
    "serve": (
        "reward_model.commands.serve",
        "scores over HTTP, in the forms that OpenRLHF, verl and vLLM know",
    ),
    "novelty": ("reward_model.commands.novelty", "how far texts are from the training data, given with each score"),
    "doctor": ("reward_model.commands.doctor", "what is wrong with preferences, before anything is trained on them"),
    "report": ("reward_model.commands.report", "a page of charts, mistakes and settings, of a run or of several"),
    "plan": ("reward_model.commands.plan", "memory and communication of a run, and the line that launches it"),
    "check": (
        "reward_model.commands.check",
        "whether main.py would take these flags: what can be seen without loading anything",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status; an error that the user can mend is one line."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: reward-model COMMAND …   (reward-model COMMAND --help lists its flags)\n")
        for command, (_, does) in COMMANDS.items():
            print(f"  {command:10}{does}")
        return 0
    quieten("--debug" in rest)
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there is {', '.join(COMMANDS)}"
            raise UserError(f"no command {name}; {meant}")
        status = importlib.import_module(COMMANDS[name][0]).main(rest)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL if isinstance(error, Ended) else 1
    except KeyboardInterrupt:
        print("\nended by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at the end
        return 0
    except ModuleNotFoundError as error:
        if "--debug" in rest or (error.name or "").startswith("reward_model"):
            raise
        print(not_installed(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
