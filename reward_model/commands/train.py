# SPDX-License-Identifier: Apache-2.0
"""``reward-model train``, and ``training_scripts/main.py``: a run from its command line to its exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time

from reward_model.common.distributed import end, prepare_environment, release_shared_memory
from reward_model.common.errors import printable
from reward_model.common.logging import logger, outlive_the_reader, quieten, show_messages
from reward_model.common.orphans import end_with_the_launcher
from reward_model.common.pulse import pulse

RESUMABLE = os.EX_TEMPFAIL  # 75, exit status of a run that was asked to end and goes on when it is started again
LAUNCHER_GRACE = 3.0  # seconds in which a launcher ends the other ranks once the first has said what is wrong

SMALLER = "lower --per_device_train_batch_size or --max_seq_len, add --gradient_checkpointing, or raise --zero_stage"
SMALLER_ON_HOST = "lower --per_device_train_batch_size or --max_seq_len, start fewer processes, or leave --offload out"
NO_HOST_MEMORY = ("DefaultCPUAllocator", "Cannot allocate memory", "std::bad_alloc")
LOST_CONTACT = ("closed by peer", "Connection reset", "Connection refused", "Broken pipe", "Timed out")


def main(arguments: list[str] | None = None) -> int:
    """Run and return the exit status; an error that the user can mend is one line, said by the first rank."""
    words = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    outlive_the_reader()
    end_with_the_launcher()
    pulse.is_main = True
    prepare_environment()
    debug = "--debug" in words
    quieten(debug)
    show_messages()
    import torch

    from reward_model.common.errors import UserError, first_line
    from reward_model.config.options import parse
    from reward_model.training.stopping import Interrupted

    try:
        config = parse(words)
        from reward_model.training.run import run  # seconds of imports, which a typo need not wait for

        run(config)
    except Interrupted as end_of_run:
        _ignore_requests()  # the launcher ends the others as soon as one has ended
        logger.info(str(end_of_run))
        end()
        return RESUMABLE
    except UserError as error:
        return fail(str(error), debug)
    except torch.OutOfMemoryError:
        return fail(f"out of memory on the device: {SMALLER}", debug)
    except MemoryError:
        return fail(f"out of memory on the host: {SMALLER_ON_HOST}", debug)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return fail(f"out of memory on the host: {SMALLER_ON_HOST}", debug)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return fail(f"no space left on the disk: {error}", debug)
    except RuntimeError as error:
        if any(words in str(error) for words in NO_HOST_MEMORY):
            return fail(f"out of memory on the host ({first_line(error)}): {SMALLER_ON_HOST}", debug)
        # gloo raises a plain RuntimeError; the rest of torch.distributed has classes of its own
        is_lost = isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in LOST_CONTACT)
        if not is_lost:
            raise
        if "EADDRINUSE" in str(error):
            return fail("the port is in use by another run: deepspeed --master_port N main.py takes another", debug)
        what = (
            "lost contact with another process: its own message says why, or a signal ended it, as the kernel does "
            f"when memory is out ({first_line(error)})"
        )
        return fail(what, debug, wait=LAUNCHER_GRACE)
    end()
    return 0


def _interrupt(number: int, frame) -> None:
    """Ends this process in a line: before there is anything to save, or at the second request.

    No exception: libraries that are being imported would make another one of it.
    """
    _ignore_requests()
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        what = f"error: ended at once by {name}; started again, it goes on from the newest checkpoint, if there is one"
        print(f"\n{what}", file=sys.stderr, flush=True)
    release_shared_memory()
    os._exit(128 + number)


def _ignore_requests() -> None:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)


def fail(message: str, debug: bool, wait: float = 0.0) -> int:
    """Say what is wrong and leave: the launcher ends the ranks that wait for this one.

    Args:
        wait: seconds before leaving, so that a rank that is at fault ends first, and its exit status is the run's.
    """
    rank = os.environ["RANK"]
    release_shared_memory()  # first: the launcher may end this process while it waits
    signal.signal(signal.SIGTERM, signal.SIG_IGN if rank == "0" else signal.SIG_DFL)  # the end of a launcher's patience
    if debug:
        import traceback

        traceback.print_exc()
    elif rank != "0":
        time.sleep(LAUNCHER_GRACE)  # only one voice, unless the fault is this rank's alone
    message = printable(message)
    print(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(wait)
    os._exit(1)
