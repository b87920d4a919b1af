# SPDX-License-Identifier: Apache-2.0
"""preflight.py: what a host says of itself, and what is made of the answers. tests/distributed has real hosts."""

import importlib.util
import json
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest
from runs import SCRIPTS, free_port

SPEC = importlib.util.spec_from_file_location("preflight", SCRIPTS / "preflight.py")
preflight = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(preflight)

FACTS = {
    "time": 1000.0,
    "came_in_by": "10.0.0.1",
    "addresses": ["10.0.0.1"],
    "python": "3.11.7",
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "transformers": "5.23.0",
    "datasets": "5.2.0",
    "peft": "0.17",
    "code": "0123456789abcdef",
    "model": "aaaaaaaaaaaaaaaa",
    "data": "bbbbbbbbbbbbbbbb on the hub",
    "missing": {"model": [], "data": []},
    "gpus": 8,
    "kind": "GPUs",
    "folder": "/output",
    "writable": True,
    "free": 1e12,
    "need": 2e9,
}


def hosts(*changes):
    """Hosts whose facts differ from FACTS in these."""
    made = []
    for number, change in enumerate(changes, 1):
        host = preflight.Host(f"node{number}", 8)
        host.facts = FACTS | change if "silent" not in change else change
        host.asked, host.answered = 999.0, 1001.0
        made.append(host)
    return made


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"torch": "2.12.1"}, ("alike", "node3: torch: 2.12.1, node1, node2: 2.13.0")),
        ({"deepspeed": ""}, ("alike", "node3: deepspeed: none, node1, node2: 0.19.8")),
        ({"peft": ""}, ("alike", "node3: peft: none, node1, node2: 0.17")),
        ({"python": "3.10.1"}, ("alike", "node3: Python: 3.10.1, node1, node2: 3.11.7")),
        ({"code": "x" * 16}, ("alike", "node3: this checkout's code differs from that of node1, node2")),
        ({"model": "x" * 16}, ("alike", "node3: the model differs from that of node1, node2")),
        ({"data": "x" * 16}, ("alike", "node3: the data differs from that of node1, node2")),
        ({"data": "", "missing": {"data": ["my.jsonl"]}}, ("path", "node3: no my.jsonl")),
        ({"gpus": 0, "kind": "no GPU"}, ("alike", "node3: its processors: no GPU, node1, node2: GPUs")),
        ({"gpus": 7}, ("slots", "node3: 8 slots in the hostfile, 7 GPUs")),
        ({"writable": False}, ("disk", "node3: cannot write to /output")),
        ({"time": 1100.0}, ("clock", "node3: clock 99 s ahead of this machine's")),
        ({"time": 900.0}, ("clock", "node3: clock 99 s behind this machine's")),
        ({"time": 1025.0}, None),
        ({"silent": "no connection by ssh: refused"}, ("ssh", "node3: no connection by ssh: refused")),
    ],
)
def test_the_host_that_differs_is_named(change, complaint):
    assert preflight.complaints(hosts({}, {}, change)) == ([complaint] if complaint else [])


def test_what_all_hosts_lack_is_said_of_each():
    lacking = {"torch": "", "deepspeed": "0.19.8"}
    found = preflight.complaints(hosts(lacking, lacking))
    assert found == [("alike", f"{name}: no torch in {sys.executable}") for name in ("node1", "node2")]


def test_room_is_needed_where_the_model_is_written():
    little = {"free": 5e9, "need": 16e9}
    assert preflight.complaints(hosts({}, little)) == []
    assert preflight.complaints(hosts(little, {})) == [("disk", "node1: 5.0 GB free at /output, 16.0 GB needed")]


@pytest.mark.parametrize(
    ("came_in_by", "addresses", "expected"),
    [
        ("10.0.0.1", ["10.0.0.1", "192.168.0.1"], "10.0.0.1"),
        ("127.0.0.1", ["192.168.0.1"], "192.168.0.1"),  # launched on the first host itself
        ("::1", ["127.0.1.1", "10.0.0.7"], "10.0.0.7"),
        ("", [], ""),
    ],
)
def test_the_first_host_s_address(came_in_by, addresses, expected):
    (first,) = hosts({"came_in_by": came_in_by, "addresses": addresses})
    assert preflight.address_of(first) == expected


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a").write_text("text")
    assert preflight.source(str(one)) == preflight.source(str(other)) != ""
    (other / "a").write_text("next")
    assert preflight.source(str(one)) != preflight.source(str(other))
    (other / "a").rename(other / "b")
    (other / "b").write_text("text")
    assert preflight.source(str(one)) != preflight.source(str(other))


def test_hidden_files_and_the_order_of_a_folder_say_nothing(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, names in ((one, "ab"), (other, "ba")):
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "rows").write_text(name)
    (other / ".cache").mkdir()
    (other / ".cache" / "rows").write_text("x")
    assert preflight.source(str(one)) == preflight.source(str(other))


def test_a_large_file_is_known_by_its_ends(tmp_path):
    files = [tmp_path / name / "weights" for name in ("one", "same", "other")]
    for file, last in zip(files, (b"x", b"x", b"y")):
        file.parent.mkdir()
        with file.open("wb") as content:
            content.truncate(65 << 20)
            content.seek(-1, os.SEEK_END)
            content.write(last)
    first, same, other = (preflight.fingerprint([file]) for file in files)
    assert first == same != other


@pytest.mark.parametrize("name", ["./nothing", "/no/such", "a/b/c", "rows.jsonl"])
def test_a_path_that_is_not_there(name):
    assert preflight.source(name) == ""


@pytest.mark.parametrize("name", ["facebook/opt-350m", "gpt2", "Qwen/Qwen2.5-7B"])
def test_a_hub_name_is_taken_at_its_word(name):
    assert preflight.source(name) == "on the hub"


def test_the_flags_that_name_files():
    words = ["--data_path", "a b", "c", "--zero_stage", "2", "--model_name_or_path=m", "--offload", "--output_dir", "o"]
    flags = preflight.run_flags(words)
    assert (flags.data_path, flags.model_name_or_path, flags.output_dir) == (["a b", "c"], "m", "o")


def test_the_first_host_listens_and_another_comes(tmp_path, capsys):
    port, note = str(free_port()), str(tmp_path / ".note")
    answers = {}
    listening = threading.Thread(target=lambda: answers.update(first=preflight.listen(port, note, "1")))
    listening.start()
    while not os.path.exists(note):
        pass
    assert preflight.reach("127.0.0.1", port, note) == {}
    listening.join(10)
    assert answers == {"first": {}}
    assert not os.path.exists(note)


def test_a_port_in_use_and_one_that_nobody_answers(tmp_path):
    note = str(tmp_path / ".note")
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        assert preflight.listen(port, note, "1") == {
            "problem": f"port {port}: Address already in use (MASTER_PORT=N takes another)"
        }
    (tmp_path / ".note").touch()
    answer = preflight.reach("127.0.0.1", port, note)
    assert answer == {
        "problem": f"cannot reach 127.0.0.1, port {port}: Connection refused (a firewall, or MASTER_ADDR)"
    }


@pytest.fixture
def ssh(tmp_path):
    """A command that stands for ssh: runs what it is asked to here, except on hosts that are down or strange."""
    script = tmp_path / "ssh"
    script.write_text(
        "#!/bin/bash\n"
        "export SSH_CONNECTION='10.0.0.9 5 10.0.0.5 22'\n"
        'echo "welcome!"\n'
        'case $1 in down) echo "ssh: no route" >&2; exit 255 ;; odd) echo "bash: gone" >&2; exit 127 ;; esac\n'
        'exec env -u PYTHONPATH bash -c "$2"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def check(ssh, hosts, *flags, allow=(), address="127.0.0.1"):
    words = [sys.executable, SCRIPTS / "preflight.py", "--allow", *allow, "--address", address, hosts]
    environment = os.environ | {"SSH": f"'{ssh}'"}
    return subprocess.run(
        [*words, str(free_port()), *flags], capture_output=True, text=True, timeout=60, env=environment, cwd=ssh.parent
    )


def test_hosts_that_are_ready(ssh):
    result = check(ssh, "a:1,b:1", "--output_dir", "out put")
    assert (result.returncode, result.stdout) == (0, "127.0.0.1\n"), result.stderr
    assert result.stderr.startswith("preflight: 2 processes on 2 hosts, torch ")


def test_packages_that_pythonpath_brings_are_seen(ssh, tmp_path, monkeypatch):
    for name in ("torch", "deepspeed"):
        (tmp_path / "more" / f"{name}-9.9.dist-info").mkdir(parents=True)
        (tmp_path / "more" / f"{name}-9.9.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 9.9\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "more"))
    assert "torch 9.9, deepspeed 9.9: ready" in check(ssh, "a:1").stderr


def test_the_address_by_which_ssh_came_in(ssh):
    assert check(ssh, "a:1", address="").stdout == "10.0.0.5\n"


def test_hosts_that_are_down_or_lack_the_interpreter(ssh):
    result = check(ssh, "a:1,down:1,odd:1")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "error: down: no connection by ssh: ssh: no route [ssh]",
        "error: odd: bash: gone [ssh]",
    ]


def test_a_missing_model_is_said_and_can_be_allowed(ssh):
    flags = ("--model_name_or_path", "./nothing")
    result = check(ssh, "a:1", *flags)
    assert (result.returncode, result.stderr) == (1, "error: a: no ./nothing [path]\n")
    assert check(ssh, "a:1", *flags, allow=["path"]).returncode == 0
    wrong = check(ssh, "a:1", *flags, allow=["pth"])
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: PREFLIGHT_ALLOW: no topic pth; there are alike, ")


def test_what_a_host_says_is_a_line_of_json(ssh):
    words = [ssh, "a", f"{sys.executable} - look {SCRIPTS.parent} --data_path x.jsonl"]
    result = subprocess.run(words, stdin=(SCRIPTS / "preflight.py").open(), capture_output=True, text=True, timeout=60)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(preflight.MARK))
    facts = json.loads(line.removeprefix(preflight.MARK))
    assert set(facts) == set(FACTS)
    assert facts["missing"] == {"model": [], "data": ["x.jsonl"]}


def test_a_named_evaluation_set_is_looked_for_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text("{}\n")
    flags = ["--eval_data_path", "chat=chat.jsonl", "code=code.jsonl", "owner/data"]
    assert preflight.look(str(tmp_path), flags)["missing"]["data"] == ["code.jsonl"]
