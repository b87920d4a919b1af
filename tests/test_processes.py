# SPDX-License-Identifier: Apache-2.0
"""common/processes.py and meeting.py, and what distributed.py removes from /dev/shm."""

import mmap
import os
import subprocess
import sys
import time

import pytest

from reward_model.common import distributed, meeting
from reward_model.common.logging import Unbroken
from reward_model.common.processes import command_line, is_launcher, launchers, named, this_process


def test_a_process_is_not_mistaken_for_a_later_one():
    assert this_process().is_there()
    with subprocess.Popen(["sleep", "30"]) as process:
        found = named(process.pid)
        assert found.is_there()
        process.kill()
        time.sleep(0.1)
        assert not found.is_there()  # its parent, this process, has not asked for its status yet
    assert not named(process.pid).is_there()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("/x/bin/python -u -m deepspeed.launcher.launch --world_info=e30= main.py", True),
        ("/x/bin/python -m deepspeed.launcher.runner main.py", True),
        ("/x/bin/python /x/bin/deepspeed main.py", True),
        ("/x/bin/python /x/bin/torchrun main.py", True),
        ("python /a/training_scripts/supervise.py --log x", True),
        ("bash -c deepspeed", True),  # a shell that is about to become it
        ("python main.py --local_rank=0 --data_path deepspeed", False),
        ("bash run.sh", False),
    ],
)
def test_launchers_are_known_by_their_command_line(words, expected):
    assert is_launcher(words.split()) is expected


def test_a_shell_is_no_launcher():
    assert command_line(os.getpid())[0]
    code = "from reward_model.common.processes import launchers; print(launchers())"
    result = subprocess.run(["sh", "-c", f"{sys.executable} -c '{code}'; true"], capture_output=True, text=True)
    assert result.stdout == "[]\n"
    assert all(each.is_there() for each in launchers())


def test_shared_memory_goes_if_it_is_old_and_nobody_has_mapped_it(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "SHARED_MEMORY", tmp_path)
    names = ["old", "fresh", "mapped"]
    paths = {name: tmp_path / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500_{name}" for name in names}
    for path in paths.values():
        path.write_bytes(b"x" * 4096)
    other = tmp_path / "somebody's"
    other.touch()
    for name in ("old", "mapped"):
        os.utime(paths[name], (0, time.time() - 120))
    os.utime(other, (0, 0))
    with paths["mapped"].open("r+b") as file, mmap.mmap(file.fileno(), 0):
        os.utime(paths["mapped"], (0, time.time() - 120))
        distributed.remove_left_shared_memory()
        assert sorted(tmp_path.iterdir()) == sorted([paths["fresh"], paths["mapped"], other])
    distributed.remove_left_shared_memory()
    assert sorted(tmp_path.iterdir()) == sorted([paths["fresh"], other])


@pytest.mark.parametrize(
    ("world", "local", "address", "agent", "expected"),
    [
        ("1", "1", "127.0.0.1", "", "onemachine://"),
        ("2", "2", "127.0.0.1", "", "onemachine://"),
        ("2", "2", "localhost", "", "onemachine://"),
        ("2", "2", "10.1.2.3", "", None),
        ("2", "2", "127.0.0.1", "True", None),  # torchrun's own store
        ("4", "2", "127.0.0.1", "", None),  # several hosts
    ],
)
def test_where_ranks_meet(monkeypatch, world, local, address, agent, expected):
    values = {"WORLD_SIZE": world, "LOCAL_SIZE": local, "MASTER_ADDR": address, "TORCHELASTIC_USE_AGENT_STORE": agent}
    for name in ("LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert meeting.method() == expected
    assert ("GLOO_SOCKET_IFNAME" in os.environ) is (world == local)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def test_a_reader_that_is_gone_does_not_end_who_writes():
    reads, writes = os.pipe()
    file = Unbroken(writes, "w")
    assert file.write(b"heard") == 5
    assert os.read(reads, 10) == b"heard"
    os.close(reads)
    assert file.write(b"not heard") == 9
    file.close()
