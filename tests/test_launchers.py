# SPDX-License-Identifier: Apache-2.0
"""The shell launchers: what they start, with which words, what they log, and how they end.

Several hosts are played by a stand-in for ssh that runs everything on this machine; tests/distributed has real ones.
"""

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest
import runs
from flags import read
from runs import SCRIPTS, Metrics, free_port

NASTY = 'it\'s 100%n of "$HOME"; a\\b\n*'
PDSH = pytest.param("deepspeed", marks=pytest.mark.skipif(shutil.which("pdsh") is None, reason="no pdsh"))

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def launch(script, *flags, cwd=None, timeout=60, **environment):
    """Run a launcher; a variable that is None is unset."""
    words = ["bash", str(SCRIPTS / script), *[str(flag) for flag in flags]]
    return subprocess.run(
        words, cwd=cwd, env=runs.environment(**environment), capture_output=True, text=True, timeout=timeout
    )


def dry(script, *flags, **environment):
    """The words that a launcher would start, which it prints also where the model or the data is not here."""
    result = launch(script, *flags, DRY_RUN="1", **environment)
    assert (result.returncode, result.stderr) == (0, "") or re.fullmatch(r"(?s)error: .* no such .*\n", result.stderr)
    return shlex.split(result.stdout)


def flags_of(words):
    return words[words.index(str(SCRIPTS / "main.py")) + 1 :]


def value(words, flag):
    return words[words.index(flag) + 1]


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def gpus(tmp_path):
    """A PATH on which nvidia-smi lists four GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    lines = "".join(f"GPU {i}: H200 (UUID: GPU-{i})\\n" for i in range(4))
    executable(folder / "nvidia-smi", f"#!/bin/sh\nprintf '{lines}'\n")
    return f"{folder}:{os.environ['PATH']}"


# One machine


def test_a_config_file_becomes_flags_which_come_before_those_given(tmp_path):
    """Other hosts need no copy of it, and MODEL and DATA do not replace what it says."""
    config = tmp_path / "my run.yaml"
    config.write_text("model_name_or_path: it's a model\nlearning_rate: 1e-5\noffload: true\nzero_stage: 2\n")
    words = flags_of(dry("single_gpu.sh", "--config", config, "--zero-stage", 3, cwd=tmp_path))
    assert "--config" not in words
    found = read(words)
    assert (found.model_name_or_path, found.learning_rate, found.offload) == ("it's a model", 1e-5, True)
    assert (found.zero_stage, found.data_path) == (3, ["Dahoas/rm-static"])
    assert found.output_dir == str(tmp_path / "output")


def test_hyphens_stand_for_underscores(tmp_path):
    words = flags_of(dry("single_gpu.sh", f"--output-dir={tmp_path}/here", "--model-name-or-path", "mine"))
    assert words.count("--output_dir") == words.count("--model_name_or_path") == 0
    assert (read(words).output_dir, read(words).model_name_or_path) == (f"{tmp_path}/here", "mine")


def test_a_user_s_flags_come_last_and_replace_the_defaults(tmp_path):
    words = flags_of(dry("single_gpu.sh", "--zero_stage", 2, "--data_path", "a b", "c", cwd=tmp_path, MODEL="my model"))
    assert words[:4] == ["--model_name_or_path", "my model", "--output_dir", str(tmp_path / "output")]
    assert words[4:] == ["--zero_stage", "2", "--data_path", "a b", "c"]
    assert read(words).data_path == ["a b", "c"]
    assert flags_of(dry("single_gpu.sh", f"--output_dir={tmp_path}"))[-1] == f"--output_dir={tmp_path}"
    assert flags_of(dry("single_gpu.sh", "--model_name_or_path", NASTY))[-1] == NASTY


def test_the_launcher_and_its_processes(gpus):
    assert value(dry("single_node.sh"), "--num_gpus") == "1"  # no GPU: a process on the CPU
    assert value(dry("single_node.sh", PATH=gpus), "--num_gpus") == "4"
    assert value(dry("single_gpu.sh", PATH=gpus), "--num_gpus") == "1"
    assert value(dry("single_node.sh", NUM_GPUS="3"), "--num_gpus") == "3"
    assert value(dry("single_node.sh", NUM_GPUS="2", LAUNCHER="torchrun"), "--nproc_per_node") == "2"
    assert value(dry("single_node.sh", MASTER_PORT="29999"), "--master_port") == "29999"


@pytest.mark.slow
def test_visible_gpus_are_the_ones_used(gpus):
    two_visible = {"PATH": gpus, "CUDA_VISIBLE_DEVICES": "1,3"}
    assert value(dry("single_node.sh", **two_visible), "--include") == "localhost:1,3"
    assert value(dry("single_gpu.sh", **two_visible), "--include") == "localhost:1"
    by_name = dry("single_node.sh", PATH=gpus, CUDA_VISIBLE_DEVICES="GPU-1,GPU-3")
    assert "torch.distributed.run" in by_name  # deepspeed reads numbers only
    assert value(by_name, "--nproc_per_node") == "2"


@pytest.mark.parametrize(
    ("settings", "batch", "accumulation"),
    [
        ({"GLOBAL_BATCH": "64", "NUM_GPUS": "8"}, "8", "1"),
        ({"GLOBAL_BATCH": "64", "MICRO_BATCH": "4", "NUM_GPUS": "8"}, "4", "2"),
        pytest.param({"GLOBAL_BATCH": "64", "NUM_GPUS": "1"}, "16", "4", marks=pytest.mark.slow),
        ({"GLOBAL_BATCH": "24", "MICRO_BATCH": "16", "NUM_GPUS": "1"}, "12", "2"),  # the largest divisor of 24
        ({"GLOBAL_BATCH": "7", "MICRO_BATCH": "4", "NUM_GPUS": "1"}, "1", "7"),
    ],
)
def test_a_global_batch_stays_whatever_shares_it(settings, batch, accumulation):
    words = dry("single_node.sh", **settings)
    assert value(words, "--per_device_train_batch_size") == batch
    assert value(words, "--gradient_accumulation_steps") == accumulation


def test_a_batch_that_is_given_is_left_alone():
    words = flags_of(dry("single_node.sh", "--per_device_train_batch_size", "4", GLOBAL_BATCH="64"))
    assert words.count("--per_device_train_batch_size") == 1
    assert value(words, "--gradient_accumulation_steps") == "16"
    both = ("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "5")
    assert flags_of(dry("single_node.sh", *both, GLOBAL_BATCH="64"))[-4:] == list(both)
    result = launch("single_node.sh", *both[:2], DRY_RUN="1", GLOBAL_BATCH="64")
    assert result.stderr == "error: --per_device_train_batch_size 3 × 1 processes does not divide GLOBAL_BATCH=64\n"
    assert value(flags_of(dry("single_node.sh", MICRO_BATCH="2")), "--per_device_train_batch_size") == "2"


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("single_node.sh", {"NUM_GPUS": "three"}, "NUM_GPUS=three is not a number of GPUs"),
        ("single_node.sh", {"NUM_GPUS": "9" * 20}, f"NUM_GPUS={'9' * 20}: more than 1024 processes on a machine"),
        ("single_node.sh", {"NUM_GPUS": "2000"}, "NUM_GPUS=2000: more than 1024 processes on a machine"),
        ("single_node.sh", {"GRACE": "$(x)"}, "GRACE=$(x) is not a number of seconds"),
        ("single_node.sh", {"NUM_GPUS": "0"}, "NUM_GPUS=0 is not a number of GPUs"),
        ("single_node.sh", {"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun: deepspeed or torchrun"),
        ("single_node.sh", {"GLOBAL_BATCH": "64", "NUM_GPUS": "3"},
         "GLOBAL_BATCH=64 cannot be shared by 3 processes: take a multiple of 3"),
        ("single_node.sh", {"GLOBAL_BATCH": "many"}, "GLOBAL_BATCH and MICRO_BATCH are whole numbers above 0"),
        ("multi_node.sh", {"HOSTFILE": "none"},
         'no hostfile none: write a line "name slots=8" for each host, and set HOSTFILE'),
        ("slurm.sbatch", {"DRY_RUN": "0"}, "no allocation: sbatch slurm.sbatch, or DRY_RUN=1 bash slurm.sbatch"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(script, settings, message):
    result = launch(script, **{"DRY_RUN": "1"} | settings)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"error: {message}\n")


def test_a_run_leaves_its_output_and_log_and_an_upstream_line_works(demo, tmp_path):
    output = tmp_path / "my output"
    flags = ["--max_seq_len", 256, "--learning_rate", 1e-3, "--data_output_path", demo / "cache"]
    upstream = ["--num_padding_at_beginning", 1, "--weight_decay", 0.1, "--zero_stage", 0, "--deepspeed"]
    where = {"MODEL": str(demo / "model"), "DATA": str(demo / "data"), "OUTPUT": str(output), "GLOBAL_BATCH": "80"}
    result = launch("single_gpu.sh", *flags, *upstream, cwd=tmp_path, timeout=300, **where)
    assert result.returncode == 0, result.stdout[-3000:]
    log = (output / "training.log").read_text()
    assert shlex.split(log.splitlines()[0])[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert "held-out accuracy" in log
    assert log.endswith(result.stdout)
    assert len(Metrics(output / "metrics.jsonl", result).losses) == 4  # 320 pairs, 80 a step


@pytest.mark.slow
def test_the_failing_rank_s_status_is_the_launcher_s(demo, tmp_path):
    flags = ["--data_path", demo / "data", "--output_dir", "an output", "--model_name_or_path", demo / "model"]
    flags += ["--max_seq_len", "2"]
    for launcher in ("deepspeed", "torchrun"):
        result = launch("single_node.sh", *flags, cwd=tmp_path, timeout=120, LAUNCHER=launcher, NUM_GPUS="2")
        assert result.returncode == 1
        assert "error: " in result.stdout
        assert "alone is longer than --max_seq_len 2" in result.stdout
        assert "longer than --max_seq_len" in (tmp_path / "an output" / "training.log").read_text()


def test_what_a_look_shows_is_said_before_anything_starts_and_leaves_the_log_alone(tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "run.json").write_text("{}")
    for flags, message in (
        (["--output_dir", used], f"--output_dir {used} holds another run (run.json): name a new folder"),
        (
            ["--learning_rat", 1],
            "unrecognized arguments: --learning_rat 1; did you mean --learning_rate? (--help lists the flags)",
        ),
        (["--model_name_or_path", "my modl"], "--model_name_or_path my modl: no such folder"),
        (["--data_path", "my.jsonl"], "my.jsonl: no such file or folder"),
    ):
        result = launch("single_node.sh", *flags, cwd=tmp_path)
        assert (result.returncode, result.stdout, result.stderr) == (1, "", f"error: {message}\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["run.json", "used"]


def test_an_interpreter_that_is_asked_for_is_taken_or_refused(tmp_path):
    bare = executable(tmp_path / "python", '#!/bin/sh\n[ "$1" = -c ] || echo "torch>=2.4, deepspeed"\n')
    for python, why in (("no-such-python", "is not there"), (str(bare), "lacks torch>=2.4, deepspeed")):
        result = launch("single_node.sh", DRY_RUN="1", PYTHON=python)
        assert (result.returncode, result.stderr) == (1, f"error: PYTHON={python} {why}\n")


def test_a_copy_elsewhere_names_the_scripts(tmp_path):
    copy = tmp_path / "mine.sh"
    text = (SCRIPTS / "single_node.sh").read_text()
    copy.write_text(text.replace("facebook/opt-350m", "my/model").replace("Dahoas/rm-static", "my data"))
    words = dry(copy, SCRIPTS=str(SCRIPTS))
    assert flags_of(words)[:4] == ["--model_name_or_path", "my/model", "--data_path", "my data"]
    lost = launch(copy)
    assert (lost.returncode, lost.stderr) == (1, "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts\n")


# Several hosts


@pytest.fixture
def cluster(tmp_path):
    """Two hosts, played by this machine: a stand-in for ssh, and for the interpreter, which prints main.py's words.

    The stand-in for the processes of rank 1 ends with the status that is in the file status.
    """
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "hostfile").write_text("# two\n\na slots=2\n  b   slots=2  # the other\n")
    executable(
        folder / "ssh",
        "#!/bin/bash\n"
        "while [ $# -gt 2 ]; do shift; done\n"
        'case $(cat down 2>/dev/null) in "$1") echo "ssh: no route" >&2; exit 255 ;; esac\n'
        'exec env -u HF_TOKEN -u HF_HOME -u NCCL_DEBUG bash -c "$2"\n',  # another machine knows nothing of ours
    )
    executable(
        folder / "python",
        "#!/bin/bash\n"
        f'[ "$1" = -u ] || exec {shlex.quote(sys.executable)} "$@"\n'
        'printf "%q " "$@"; echo\n'
        'for folder in output "an output"; do [ ! -d "$folder" ] || touch "$folder/finished.json"; done\n'
        'env | grep -E "^(HF_HOME|HF_TOKEN|NCCL_DEBUG|FROM_FILE)=" | sort\n'
        'case "$*" in *node_rank?1*) exit "$(cat status)" ;; *) exec sleep "$(cat seconds)" ;; esac\n',
    )
    (folder / "status").write_text("0")
    (folder / "seconds").write_text("0")
    return folder


def launch_cluster(cluster, launcher, *flags, **environment):
    settings = {
        "PYTHON": str(cluster / "python"),
        "PATH": f"{cluster}:{os.environ['PATH']}",
        "HOSTFILE": "hostfile",
        "LAUNCHER": launcher,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "MODEL": str(cluster),
        "DATA": "hub/data",
    }
    return launch("multi_node.sh", *flags, cwd=cluster, **settings | environment)


@pytest.mark.parametrize("launcher", [PDSH, "torchrun"])
def test_every_host_gets_the_words_and_the_environment(launcher, cluster):
    (cluster / ".deepspeed_env").write_text("FROM_FILE=two words\n")
    secrets = {"HF_HOME": NASTY.replace("\n", " "), "HF_TOKEN": "secret", "NCCL_DEBUG": "INFO"}
    result = launch_cluster(cluster, launcher, "--data_path", NASTY, "x", "--output_dir", "an output", **secrets)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.startswith("preflight: 4 processes on 2 hosts")
    for rank, host in enumerate("ab"):
        lines = [line.removeprefix(f"{host}: ") for line in result.stdout.splitlines() if line.startswith(f"{host}: ")]
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {lines[0]}"], capture_output=True, text=True).stdout
        words = words.split("\0")[:-1]
        assert flags_of(words)[2:] == ["--data_path", NASTY, "x", "--output_dir", "an output"]
        assert {"deepspeed": f"--node_rank={rank}", "torchrun": "--node_rank"}[launcher] in words
        assert lines[1:] == ["FROM_FILE=two words", f"HF_HOME={secrets['HF_HOME']}", "NCCL_DEBUG=INFO"]
    assert "secret" not in result.stdout + (cluster / "an output" / "training.log").read_text()


@pytest.mark.parametrize("launcher", [PDSH, "torchrun"])
def test_the_host_that_fails_is_named_and_the_other_ended(launcher, cluster):
    (cluster / "status").write_text("7")
    (cluster / "seconds").write_text("60")
    result = launch_cluster(cluster, launcher, timeout=30)
    assert result.returncode == 7
    assert result.stderr.endswith("error: b failed with exit status 7; the other hosts were ended\n")
    assert "error: b failed" in (cluster / "output" / "training.log").read_text()
    assert not subprocess.run(["pgrep", "-f", f"{cluster}/python"], capture_output=True, text=True).stdout


def test_a_host_that_is_down_stops_the_run_before_it_starts(cluster):
    (cluster / "down").write_text("b")
    result = launch_cluster(cluster, "torchrun")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: b: no connection by ssh: ssh: no route [ssh]\n"


def test_a_dry_run_prints_the_command_of_every_host(cluster):
    result = launch_cluster(cluster, "torchrun", NASTY, DRY_RUN="1", MASTER_ADDR=None, PYTHON=sys.executable)
    first, second = result.stdout.removeprefix("# on a:\n").split("# on b:\n")
    for rank, text in enumerate((first, second)):
        words = shlex.split(text)
        assert words[:5] == ["cd", str(cluster), "&&", "exec", "env"]
        assert value(words, "--node_rank") == str(rank)
        assert value(words, "--nnodes") == "2"
        assert value(words, "--master_addr") == "a"
        assert words[-1] == NASTY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb\n", "hostfile, line 2, b: not a name and slots=NUMBER"),
        ("a slots=2\n# x\nb slots=0\n", "hostfile, line 3, b\\ slots=0: not a name and slots=NUMBER"),
        (
            "a slots=2\n-oProxyCommand=x slots=2\n",
            "hostfile, line 2, -oProxyCommand=x\\ slots=2: not a name and slots=NUMBER",
        ),
        ("a;touch${IFS}x slots=2\n", "hostfile, line 1, a\\;touch\\$\\{IFS\\}x\\ slots=2: not a name and slots=NUMBER"),
        ("$(touch\tx) slots=2\n", "hostfile, line 1, $'$(touch\\tx) slots=2': not a name and slots=NUMBER"),
        ("a slots=1025\n", "hostfile, line 1, slots=1025: more than 1024 processes on a machine"),
        (
            "a slots=99999999999999999999\n",
            "hostfile, line 1, slots=99999999999999999999: more than 1024 processes on a machine",
        ),
        ("a slots=2\na slots=2\n", "hostfile, line 2: a again"),
        ("# nobody\n", "hostfile names no host"),
        ("a slots=2\nb slots=1\n", "torchrun starts as many processes on every host, and hostfile has different slots"),
    ],
)
def test_a_wrong_hostfile_is_said_with_its_line(text, message, cluster):
    (cluster / "hostfile").write_text(text)
    result = launch_cluster(cluster, "torchrun")
    assert (result.returncode, result.stderr) == (1, f"error: {message}\n")
