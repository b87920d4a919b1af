# SPDX-License-Identifier: Apache-2.0
"""Where ranks meet: the store of torch's rendezvous, which listens no further than it has to.

PyTorch's own listens on every interface, whatever MASTER_ADDR says. Anyone who reaches it can read and write what the
ranks tell each other.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler

from reward_model.common.errors import UserError

SCHEME = "onemachine"
LOOPBACK = "lo"


def method() -> str | None:
    """How this process meets the others, for ``init_process_group``; None: as PyTorch does by itself.

    On one machine gloo and NCCL get the loopback interface, unless their variables say another. A run of one process
    has no store that listens. Where torchrun holds the store it listens as torchrun lets it.
    """
    world = os.environ["WORLD_SIZE"]
    if world != (os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")):
        return None
    if LOOPBACK in (name for _, name in socket.if_nameindex()):
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, LOOPBACK)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if world != "1" and not is_loopback(os.environ["MASTER_ADDR"]):
        return None
    return f"{SCHEME}://"


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def _meet(url: str, timeout: timedelta = timedelta(minutes=30), **_) -> Iterator[tuple[dist.Store, int, int]]:
    """A handler of torch's: yields the store, the rank and the number of ranks.

    Raises:
        UserError: another process listens on the port.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        yield dist.HashStore(), rank, size
        return
    host, port = socket.gethostbyname(os.environ["MASTER_ADDR"]), int(os.environ["MASTER_PORT"])
    listener = {}
    if rank == 0:
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port}: {error.strerror}, by another run: deepspeed --master_port N main.py takes another"
            ) from error
        own.listen(2048)
        listener = {"master_listen_fd": own.detach()}
    yield dist.TCPStore(host, port, size, rank == 0, timeout, multi_tenant=True, **listener), rank, size


register_rendezvous_handler(SCHEME, _meet)
