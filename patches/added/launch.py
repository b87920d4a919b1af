# SPDX-License-Identifier: Apache-2.0
"""Which rank this process is, under any launcher or none."""

import os


def launcher_rank(given):
    """The local rank from ``--local_rank``, from LOCAL_RANK (torchrun, ``deepspeed --no_local_rank``), or 0.

    Without a launcher (``python main.py``) the environment of a single process is filled in, so that
    ``deepspeed.init_distributed`` has what it reads.
    """
    if given != -1:
        return given
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    # port 0: the rendezvous takes a free one, so that two runs on one machine do not meet
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    return 0
