# SPDX-License-Identifier: Apache-2.0
"""patches/apply.sh puts the patches in and takes them out, whole or not at all; and the patches' own form."""

import contextlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from email import message_from_string
from pathlib import Path

import pytest
import upstream_stand_in

BASH, GIT = shutil.which("bash"), shutil.which("git")
pytestmark = pytest.mark.skipif(not (BASH and GIT), reason="no bash, or no git")

ROOT = os.geteuid() == 0
NOBODY = 65534
PAGE = os.sysconf("SC_PAGE_SIZE")
CHAT = "applications/DeepSpeed-Chat"
STEP_2 = f"{CHAT}/training/step2_reward_model_finetuning"
MAIN, EVAL, DPO = f"{STEP_2}/main.py", f"{STEP_2}/rw_eval.py", f"{CHAT}/training/step2_dpo_finetuning/main.py"
LAUNCH, DROP_IN = f"{CHAT}/dschat/utils/launch.py", f"{CHAT}/dschat/utils/model/reward_model.py"
KEPT = DROP_IN.replace(".py", "_upstream.py")  # where upstream's own goes
LAYOUTS = [layout for layout in ("package", "legacy") if upstream_stand_in.series(layout)]
PATCHES = [
    pytest.param(patch, id=f"{layout}/{patch.name}") for layout in LAYOUTS for patch in upstream_stand_in.series(layout)
]
COMMANDS = ("check", "apply", "revert")

# Lines of upstream's that the patches quote, blank ones not counted; some of them are lines of an earlier patch. It is
# the size of what we repeat of upstream's files: raise it only where a patch needs the line.
QUOTED = {"package": 141, "legacy": 123}


# --- a tree and the tool ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LAYOUTS)
def round_trip(request, tmp_path_factory):
    """A layout, what the commands print, and snapshots of its stand-in: original, checked, applied, reverted."""
    folder = made(tmp_path_factory.mktemp("round_trip"), request.param)
    said, shots = [], [snapshot(folder / "tree")]
    for command in COMMANDS:
        said.append(output(folder, command))
        shots.append(snapshot(folder / "tree"))
    return request.param, said, *shots


def made(folder, layout="package", patches=None):
    upstream_stand_in.make(folder, layout, patches)
    (folder / "staging").mkdir()
    (folder / "tree" / "README.md").write_text("upstream's, and in no patch\n")
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A stand-in for a few of the patches, to save time: the first three, and those for DPO and the launchers."""
    patches = [
        patch
        for number, patch in enumerate(upstream_stand_in.series("package"))
        if number < 3 or {LAUNCH, DPO} & {section.new for section in upstream_stand_in.sections(patch)}
    ]
    return made(tmp_path_factory.mktemp("originals"), "package", patches)


@pytest.fixture(scope="module")
def patched(originals, tmp_path_factory):
    folder = shutil.copytree(originals, tmp_path_factory.mktemp("patched") / "place")
    output(folder, "apply")
    return folder


@pytest.fixture
def place(originals, tmp_path):
    """A folder with tree/ as upstream has it, the tool and the patches in patches/, and staging/ as its TMPDIR."""
    return shutil.copytree(originals, tmp_path / "place")


@pytest.fixture
def applied(patched, tmp_path):
    """The same after apply."""
    return shutil.copytree(patched, tmp_path / "place")


def run(place, command, target=None, *, under=(), tool=None, cwd=None, **environment):
    """Run the tool; ``under``: the words of a command that runs it. Nothing may stay in the temporary folder."""
    values = surroundings(**{"TMPDIR": str(place / "staging")} | environment)
    words = [*under, str(tool or place / "patches" / "apply.sh"), command, str(target or place / "tree")]
    result = subprocess.run(words, cwd=cwd or place, env=values, capture_output=True, text=True, timeout=60)
    assert [file.name for file in (place / "staging").glob("tmp.*")] == []
    return result


def output(place, command, *arguments, **how):
    """What the tool prints where it is to succeed."""
    result = run(place, command, *arguments, **how)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def snapshot(folder):
    """Every path below, with its mode and, of a file, its bytes."""
    return {
        str(path.relative_to(folder)): (oct(path.lstat().st_mode), path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def differences(one, other):
    return sorted(path for path in one.keys() | other.keys() if one.get(path) != other.get(path))


def assert_refused(place, command, *words, target=None, **how):
    """One line that holds the words, and not a byte of the tree is another."""
    before = snapshot(place / "tree")
    result = run(place, command, target, **how)
    assert differences(before, snapshot(place / "tree")) == []
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("apply.sh: ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert str(word) in result.stderr
    return result.stderr


def git(folder, *words):
    words = [GIT, "-c", "user.name=a", "-c", "user.email=a@example.org", *words]
    values = surroundings(GIT_CONFIG_GLOBAL="/dev/null", GIT_CEILING_DIRECTORIES=str(folder.parent))
    return subprocess.run(words, cwd=folder, env=values, check=True, capture_output=True, text=True).stdout


def surroundings(**variables):
    """The environment, without what the user or a hook has set for git."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | variables


def added(layout="package"):
    """Every file that the patches add, and where its text is kept."""
    files = {}
    for patch in upstream_stand_in.series(layout):
        for section in upstream_stand_in.sections(patch):
            if section.added:
                files[section.new] = source(section.new)
    return files


def source(path):
    name = path.split("/utils/", 1)[1]
    if name == "model/reward_model.py":
        return upstream_stand_in.PATCHES.parent / "reward_model" / "reward_model.py"
    return upstream_stand_in.PATCHES / "added" / name


# --- what it does ----------------------------------------------------------------------------------------------------


def test_check_changes_nothing(round_trip):
    _, _, original, checked, _, _ = round_trip
    assert differences(original, checked) == []


def test_apply_adds_every_file_as_its_source_is(round_trip):
    layout, _, _, _, applied, _ = round_trip
    assert len(added(layout)) > 1
    for path, kept in added(layout).items():
        assert applied[path][1] == kept.read_bytes(), path


def test_apply_keeps_upstreams_reward_model_beside_ours(round_trip):
    _, _, original, _, applied, _ = round_trip
    (path,) = (path for path in original if path.endswith("/reward_model.py"))
    assert applied[path.replace(".py", "_upstream.py")] == original[path]
    assert applied[path] != original[path]


def test_apply_changes_every_listed_file_and_no_other(round_trip):
    layout, _, original, _, applied, _ = round_trip
    upstreams = {path for path, (_, content) in original.items() if content is not None} - {"README.md"}
    (kept,) = (path.replace(".py", "_upstream.py") for path in upstreams if path.endswith("/reward_model.py"))
    assert set(differences(original, applied)) == upstreams | added(layout).keys() | {kept}
    assert differences(*({path: shot[path][0] for path in original} for shot in (original, applied))) == []


def test_revert_gives_back_every_byte_mode_and_name(round_trip):
    _, _, original, _, _, reverted = round_trip
    assert differences(original, reverted) == []


def test_it_says_how_many_patches_went_in(round_trip):
    layout, said, *_ = round_trip
    used, there = (len(patches) for patches in (upstream_stand_in.newest(layout), upstream_stand_in.series(layout)))
    assert f"{used} of {there} patches" in said[0]
    assert f"{used} of {there} patches" in said[1]


def test_apply_and_revert_twice_in_a_row(place):
    original = snapshot(place / "tree")
    for _ in range(2):
        output(place, "apply")
        output(place, "revert")
    assert differences(original, snapshot(place / "tree")) == []


def test_files_keep_the_modes_that_the_user_gave_them(place):
    (place / "tree" / EVAL).chmod(0o755)
    (place / "tree" / MAIN).chmod(0o640)
    original = snapshot(place / "tree")
    output(place, "apply")
    now = snapshot(place / "tree")
    assert now[EVAL] != original[EVAL]
    assert {path: now[path][0] for path in (EVAL, MAIN)} == {EVAL: "0o100755", MAIN: "0o100640"}
    output(place, "revert")
    assert differences(original, snapshot(place / "tree")) == []


def test_in_a_clone_git_sees_nothing_after_revert(place):
    tree = place / "tree"
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "upstream")
    original = snapshot(tree)
    output(place, "apply")
    assert [path for path in differences(original, snapshot(tree)) if path.startswith(".git/")] == []
    assert git(tree, "status", "--porcelain") != ""
    output(place, "revert")
    assert git(tree, "status", "--porcelain") == ""


def test_a_path_with_spaces_and_a_quote(originals, tmp_path):
    place = shutil.copytree(originals, tmp_path / """somebody's own "place" $HOME""")
    original = snapshot(place / "tree")
    folder = re.search("^step 2: (cd .*) && ", output(place, "apply"), re.MULTILINE)[1]
    assert subprocess.run([BASH, "-c", f"{folder} && ls main.py"], capture_output=True).returncode == 0
    output(place, "revert")
    assert differences(original, snapshot(place / "tree")) == []


@pytest.mark.parametrize(
    ("cwd", "target"),
    [
        (".", "tree"),
        ("tree", "."),
        ("staging", "../tree/"),
        (f"tree/{CHAT}", "."),
        (".", f"link/{CHAT}/"),
    ],
)
def test_any_way_to_name_the_tree(place, cwd, target):
    (place / "link").symlink_to("tree")
    output(place, "check", target, cwd=place / cwd)


def test_a_relative_path_from_elsewhere(place):
    original, how = snapshot(place / "tree"), {"target": f"../tree/{CHAT}", "cwd": place / "staging"}
    assert str(place / "tree" / STEP_2) in output(place, "apply", **how)
    output(place, "revert", **how)
    assert differences(original, snapshot(place / "tree")) == []


def test_a_cdpath_leads_nowhere_else(place):
    """Where CDPATH is set, cd goes by it and prints where it went."""
    output(place, "check", "tree", tool="patches/apply.sh", CDPATH=f".:{place}")


def other_repository(place):
    """One whose objects have other names."""
    git(place, "init", "--quiet", "--object-format=sha256", str(place / "other"))
    return place / "other"


def git_config(place):
    file = place / "gitconfig"
    file.write_text("[core]\nautocrlf = true\neol = crlf\n[apply]\nwhitespace = fix\nignoreWhitespace = change\n")
    return str(file)


HOSTILE = {
    "variables": lambda place: {"GIT_DIR": str(place / "none"), "GIT_INDEX_FILE": "index", "GIT_WORK_TREE": "/"},
    "configuration": lambda place: {"GIT_CONFIG_GLOBAL": git_config(place)},
    "folder": lambda place: {"cwd": other_repository(place)},
    "repository": lambda place: {"GIT_DIR": str(other_repository(place) / ".git")},
    "umask": lambda place: {"under": [BASH, "-c", 'umask 077; exec "$@"', "-"]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_user_has_set_changes_nothing(name, place, patched):
    how = HOSTILE[name](place)
    original = snapshot(place / "tree")
    output(place, "apply", **how)
    contents = [{path: content for path, (_, content) in snapshot(p / "tree").items()} for p in (place, patched)]
    assert differences(*contents) == []
    output(place, "revert", **how)
    assert differences(original, snapshot(place / "tree")) == []


def test_a_temporary_folder_inside_a_repository(place, patched):
    git(place / "staging", "init", "--quiet")
    output(place, "apply")
    assert differences(snapshot(place / "tree"), snapshot(patched / "tree")) == []


def test_revert_keeps_what_the_user_added_since(applied, originals):
    file, mine = applied / "tree" / MAIN, "print('mine')\n"
    lines = file.read_text().splitlines(keepends=True)
    at = lines.index("pass  # line 100\n")
    file.write_text("".join([*lines[:at], mine, *lines[at:]]))
    (applied / "tree" / STEP_2 / "mine.py").write_text(mine)
    said = output(applied, "revert")
    assert [line for line in said.splitlines() if MAIN in line] == [f"your own changes stay in {MAIN}"]
    upstreams = (originals / "tree" / MAIN).read_text()
    assert file.read_text() == upstreams.replace("pass  # line 100\n", f"{mine}pass  # line 100\n")
    changed = differences(snapshot(applied / "tree"), snapshot(originals / "tree"))
    assert changed == [MAIN, f"{STEP_2}/mine.py"]


def test_a_file_system_without_hard_links(place, originals, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ln").symlink_to(shutil.which("false"))
    tools = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for command in ("apply", "revert"):
        output(place, command, PATH=tools)
    assert differences(snapshot(place / "tree"), snapshot(originals / "tree")) == []


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["install", "tree"], ["apply"], ["apply", "tree", "more"]])
def test_wrong_usage(place, arguments):
    result = subprocess.run([place / "patches" / "apply.sh", *arguments], cwd=place, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    for command in COMMANDS:
        assert re.search(f"^ *patches/apply.sh {command} +TARGET", result.stderr, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_not_a_checkout(place, command):
    empty, file = place / "an empty folder", place / "a file"
    empty.mkdir()
    file.touch()
    assert_refused(place, command, empty, "not a checkout of DeepSpeedExamples", target=empty)
    assert_refused(place, command, file, "no such folder", target=file)
    assert_refused(place, command, place / "none", "no such folder", target=place / "none")
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("command", ["check", "apply"])
@pytest.mark.parametrize("path", [MAIN, DROP_IN])
def test_a_file_that_the_user_changed(place, command, path):
    content = (place / "tree" / path).read_bytes()
    (place / "tree" / path).write_bytes(content[:-2] + b"!\n")
    assert_refused(place, command, path, "git stash")
    assert_refused(place, "revert", "not applied")


@pytest.mark.parametrize("command", ["check", "apply"])
def test_a_file_of_upstreams_that_is_missing(place, command):
    (place / "tree" / EVAL).unlink()
    assert_refused(place, command, EVAL)


@pytest.mark.parametrize("command", ["check", "apply"])
def test_a_symbolic_link_in_place_of_a_file(place, command):
    (place / "tree" / EVAL).rename(place / "kept.py")
    (place / "tree" / EVAL).symlink_to(place / "kept.py")
    assert_refused(place, command, EVAL, "symbolic link")


def test_a_file_of_the_users_where_the_patches_add_one(place):
    """It is not half applied, and git clean would remove the file."""
    (place / "tree" / LAUNCH).write_text("mine = True\n")
    for command in COMMANDS:
        said = assert_refused(place, command, LAUNCH)
        assert "half applied" not in said
        assert "git clean" not in said


@pytest.fixture
def checked_out(applied, originals):
    """Applied, and then upstream's files put back as by git checkout, which leaves new ones alone."""
    shutil.copytree(originals / "tree", applied / "tree", dirs_exist_ok=True)
    assert (applied / "tree" / LAUNCH).exists()
    return applied


def test_new_files_left_by_a_checkout_are_no_obstacle(checked_out, patched):
    output(checked_out, "check")
    output(checked_out, "apply")
    assert differences(snapshot(checked_out / "tree"), snapshot(patched / "tree")) == []


def test_revert_removes_new_files_left_by_a_checkout(checked_out, originals):
    output(checked_out, "revert")
    assert differences(snapshot(checked_out / "tree"), snapshot(originals / "tree")) == []


def test_a_left_file_that_was_changed_stays(checked_out):
    (checked_out / "tree" / LAUNCH).write_text("mine = True\n")
    for command in COMMANDS:
        assert_refused(checked_out, command, LAUNCH, "move away")


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock")
def test_two_at_once(place):
    chat = place / "tree" / CHAT
    keeper = subprocess.Popen(["flock", chat, "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        while subprocess.run(["flock", "--nonblock", chat, "true"]).returncode == 0:
            time.sleep(0.02)  # until the other has it
        assert_refused(place, "apply", "at work", place / "tree")
    finally:
        keeper.communicate()
    output(place, "apply")


def test_help(place):
    said = subprocess.check_output([place / "patches" / "apply.sh", "--help"], text=True)
    assert "patches/apply.sh check  TARGET" in said


def test_applied_already(applied):
    for command in ("check", "apply"):
        assert_refused(applied, command, "applied already", "revert", applied / "tree")


def test_revert_of_what_is_not_applied(place):
    assert_refused(place, "revert", "not applied", place / "tree")


def test_half_applied_the_first_patches_alone(place):
    for patch in upstream_stand_in.series("package")[:3]:
        git(place / "tree", "apply", str(patch))
    assert (place / "tree" / CHAT / "dschat/utils/model/reward_checkpoint.py").exists()
    for command in COMMANDS:
        assert_refused(place, command, "half applied", CHAT, "git checkout")


@pytest.mark.parametrize("path", [DPO, EVAL])  # DPO: of a patch that is not for every version
def test_half_applied_one_file_put_back(applied, originals, path):
    shutil.copy2(originals / "tree" / path, applied / "tree" / path)
    for command in COMMANDS:
        assert_refused(applied, command, "half applied", path)


def test_half_applied_one_added_file_deleted(applied):
    (applied / "tree" / LAUNCH).unlink()
    for command in COMMANDS:
        assert_refused(applied, command, "half applied", LAUNCH)


def test_half_applied_upstreams_reward_model_put_back(applied, originals):
    shutil.copy2(originals / "tree" / DROP_IN, applied / "tree" / DROP_IN)
    assert_refused(applied, "revert", "half applied", DROP_IN)


def test_half_applied_upstreams_reward_model_deleted(applied):
    (applied / "tree" / KEPT).unlink()
    assert_refused(applied, "revert", "half applied", DROP_IN.removesuffix(".py"))  # the two are one rename


@pytest.mark.parametrize("path", [LAUNCH, MAIN], ids=lambda path: Path(path).name)
def test_a_patched_line_that_the_user_changed_since(applied, path):
    file = applied / "tree" / path
    text = file.read_text()
    file.write_text(text.replace("launcher_rank", "launchers_rank"))
    assert file.read_text() != text
    assert_refused(applied, "revert", "half applied", path)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plain_folder_inside_another_repository(place, applied_or_not, command):
    git(place, "init", "--quiet")
    assert_refused(applied_or_not(command), command, "lies in another git repository", place)


@pytest.fixture
def applied_or_not(place, patched):
    """The place with the tree in the state that the command is made for."""

    def prepare(command):
        if command == "revert":
            shutil.rmtree(place / "tree")
            shutil.copytree(patched / "tree", place / "tree")
        return place

    return prepare


# --- what can go wrong on the way ------------------------------------------------------------------------------------


@pytest.fixture
def as_nobody(applied_or_not):
    """Gives the place to a user whom permissions bind; with it the words that run a command as that user."""
    if ROOT and not shutil.which("setpriv"):
        pytest.skip("root, whom permissions do not bind, and no setpriv")
    with tempfile.TemporaryDirectory(dir="/tmp") as top:  # nobody may not enter tmp_path
        os.chmod(top, 0o755)

        def prepare(command):
            place = shutil.copytree(applied_or_not(command), Path(top) / "place")
            if not ROOT:
                return place, []
            for path in (place, *place.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            return place, ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]

        yield prepare


@pytest.mark.parametrize("command", COMMANDS)
def test_no_permission_to_write_in_a_folder(as_nobody, command):
    place, under = as_nobody(command)
    folder = place / "tree" / STEP_2
    folder.chmod(0o555)
    assert_refused(place, command, "no permission", folder, under=under)


def test_no_permission_to_read_a_file(as_nobody):
    place, under = as_nobody("check")
    if not ROOT:
        pytest.skip("the test could not read it either")
    (place / "tree" / MAIN).chmod(0)
    assert_refused(place, "check", MAIN, under=under)


def test_no_permission_to_replace_a_file(as_nobody):
    """In a folder like /tmp everyone may add files, and nobody may replace those of others."""
    place, under = as_nobody("apply")
    if not ROOT:
        pytest.skip("not root: cannot give a file to another user")
    for path in (place / "tree" / STEP_2, *(place / "tree" / STEP_2).iterdir()):
        os.chown(path, 0, 0)
    (place / "tree" / STEP_2).chmod(0o1777)
    assert_refused(place, "apply", MAIN, under=under)


def test_no_temporary_folder(place):
    assert_refused(place, "apply", place / "none", TMPDIR=str(place / "none"))


@pytest.mark.parametrize("blocks", [1, 12])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_files_may_not_grow(applied_or_not, command, blocks):
    """A limit (KiB) below the size of upstream's files, and one between that and the size of ours."""
    place = applied_or_not(command)
    assert 1 * 1024 < (place / "tree" / MAIN).stat().st_size < 12 * 1024 < added()[DROP_IN].stat().st_size
    under = [BASH, "-c", f"trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"", "-"]
    assert_refused(place, command, "space", under=under)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 1 MiB, in which a file can leave so and so many pages or inodes free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not ROOT or not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def leave_pages(disk, free):
    """Fill the disk but for some pages."""
    with open(disk / "filler", "wb", buffering=0) as stream, contextlib.suppress(OSError):
        while stream.write(b"\0" * PAGE):
            pass
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - free * PAGE)


def leave_inodes(disk, free):
    """On tmpfs a second name takes one too, so that linking can fail."""
    state = os.statvfs(disk)
    inodes = state.f_files - state.f_ffree + free
    subprocess.run(["mount", "-o", f"remount,nr_inodes={inodes}", str(disk)], check=True)


@pytest.mark.parametrize("short_of", [leave_pages, leave_inodes])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_a_disk_that_fills_up(applied_or_not, small_disk, patched, originals, command, short_of):
    place, goal = applied_or_not(command), patched if command == "apply" else originals
    now, then = snapshot(place / "tree"), snapshot(goal / "tree")
    written = [then[path][1] for path in differences(now, then) if path in then]
    replaced = [path for path in differences(now, then) if path in now and path in then]
    need = sum(-(-len(content) // PAGE) for content in written)
    if short_of is leave_inodes:
        need = len(written) + len(replaced)
    shutil.move(place / "tree", small_disk / "tree")
    (place / "tree").symlink_to(small_disk / "tree")
    for share in (0, 0.3, 0.6, 0.9):
        short_of(small_disk, int(share * need))
        assert_refused(place, command, "no space")
    short_of(small_disk, 2 * need)
    output(place, command)
    assert differences(snapshot(small_disk / "tree"), then) == []


@pytest.mark.parametrize("command", ["apply", "revert"])
def test_a_temporary_folder_that_fills_up(applied_or_not, small_disk, command):
    """No reason to speak of a patch that does not fit, or of one half of them."""
    place = applied_or_not(command)
    (place / "staging").rmdir()
    (place / "staging").symlink_to(small_disk)
    for free in (0, 6, 12, 18):
        leave_pages(small_disk, free)
        said = assert_refused(place, command, "space")
        assert "half applied" not in said
    leave_pages(small_disk, 200)
    output(place, command)


def shim(folder, tool, misfortune, path):
    """A PATH where a tool meets with a misfortune, once: at its first call for a path. All else is the real thing."""
    folder.mkdir()
    (folder / tool).write_text(f"""#!{BASH}
real() {{ {shutil.which(tool)} "$@"; }}
met={shlex.quote(str(folder / "met"))}
case $* in
  *"{Path(path).parent}"/*{Path(path).name}*) [ -e "$met" ] || {{ >"$met"; {misfortune}; }} ;;
esac
real "$@"
""")
    (folder / tool).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(("tool", "path"), [("cat", MAIN), ("mv", MAIN), ("mv", KEPT)])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_a_write_that_fails(applied_or_not, tmp_path, command, tool, path):
    place = applied_or_not(command)
    if command == "revert" and path == KEPT:
        path = DROP_IN  # what apply adds is not written
    tools = shim(tmp_path / "bin", tool, "exit 1", path)
    assert_refused(place, command, PATH=tools)
    assert (tmp_path / "bin" / "met").exists()


@pytest.mark.parametrize("tool", ["cat", "ln", "mv"])
@pytest.mark.parametrize("command", ["apply", "revert"])
def test_stopped_on_the_way(applied_or_not, tmp_path, command, tool):
    """SIGTERM at the end of a tool's run."""
    place = applied_or_not(command)
    before = snapshot(place / "tree")
    tools = shim(tmp_path / "bin", tool, 'real "$@"; kill -TERM $PPID; exit', MAIN)
    assert run(place, command, PATH=tools).returncode != 0
    assert (tmp_path / "bin" / "met").exists()
    assert differences(before, snapshot(place / "tree")) == []


# --- the patches' form -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_without_gaps(layout):
    numbers = [int(patch.name[:4]) for patch in upstream_stand_in.series(layout)]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("patch", PATCHES)
def test_a_header_says_why(patch):
    message = message_from_string(re.split("^diff --git ", patch.read_text(), flags=re.MULTILINE)[0])
    assert re.fullmatch(r"\[PATCH\] \S.*", " ".join(message["Subject"].split()))
    body = message.get_payload()
    reason, fields = re.fullmatch(r"(.*?)\n\n((?:[A-Z][\w-]+: \S.*\n)+)\n*", body, re.DOTALL).groups()
    assert reason.strip()
    assert re.search(r"^Forwarded: \S", fields, re.MULTILINE)
    assert re.search(r"^Last-Update: \d{4}-\d\d-\d\d$", fields, re.MULTILINE)
    assert re.search(r"^Upstream-Commit: [0-9a-f]{40}$", fields, re.MULTILINE)


@pytest.mark.parametrize("patch", PATCHES)
def test_whole_blob_ids_and_no_change_of_mode(patch):
    text = patch.read_text()
    assert re.findall(r"^(?:old|new|deleted file) mode .*", text, re.MULTILINE) == []
    assert set(re.findall(r"^new file mode .*", text, re.MULTILINE)) <= {"new file mode 100644"}
    assert set(re.findall(r"^similarity .*", text, re.MULTILINE)) <= {"similarity index 100%"}
    indices = re.findall(r"^index (.*)", text, re.MULTILINE)
    assert indices or "\nrename to " in text
    for index in indices:
        assert re.fullmatch(r"[0-9a-f]{40}\.\.[0-9a-f]{40}( 100(644|755))?", index)


@pytest.mark.parametrize("patch", PATCHES)
def test_one_line_of_context(patch):
    """Between two changes of a hunk there can be two: one of each."""
    for section in upstream_stand_in.sections(patch):
        for hunk in section.hunks:
            runs = [(mark, len(list(lines))) for mark, lines in itertools.groupby(line[0] for line in hunk.lines)]
            context = [length if mark == " " else 0 for mark, length in runs]
            assert max(context[0], context[-1]) <= 1, f"{section.old}, line {hunk.old_start}"
            assert max(context) <= 2, f"{section.old}, line {hunk.old_start}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upstream_lists_the_files_that_the_patches_change(layout):
    """And the version from which the first patch of a file starts, for those that have an index line."""
    lines = (line.split() for line in (upstream_stand_in.PATCHES / "UPSTREAM").read_text().splitlines())
    listed = {(path, blob) for of, blob, _, _, path in (line for line in lines if line[0] == layout)}
    assert {path for path, _ in listed} == upstream_stand_in.originals(upstream_stand_in.newest(layout)).keys()
    first = {}
    for patch in upstream_stand_in.newest(layout):
        for section in upstream_stand_in.sections(patch):
            if section.blobs:
                first.setdefault(section.old, section.blobs[0])
    assert {item for item in first.items() if item[1] != "0" * 40} <= listed


@pytest.mark.parametrize("patch", PATCHES)
def test_the_patches_hold_the_added_files_as_they_are(patch):
    for section in upstream_stand_in.sections(patch):
        if not section.added:
            continue
        (hunk,) = section.hunks
        text = "".join(f"{line}\n" for line in hunk.side("+").values())
        is_it = text == source(section.new).read_text()
        assert is_it, f"{patch.name} holds another {section.new}: python patches/refresh.py renews it"
        assert section.blobs == ("0" * 40, upstream_stand_in.blob_id(text)), "python patches/refresh.py renews it"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_added_file_is_in_a_patch(layout):
    kept = set((upstream_stand_in.PATCHES / "added").rglob("*.py"))
    assert set(added(layout).values()) - {source(DROP_IN)} <= kept
    if layout == "package":
        assert kept <= set(added(layout).values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_patches_quote_little(layout):
    hunks = (
        hunk
        for patch in upstream_stand_in.series(layout)
        for part in upstream_stand_in.sections(patch)
        for hunk in part.hunks
    )
    quoted = [line for hunk in hunks for line in hunk.side("-").values() if line.strip()]
    assert len(quoted) <= QUOTED[layout], f"{len(quoted)} lines of upstream's, {QUOTED[layout]} so far"
