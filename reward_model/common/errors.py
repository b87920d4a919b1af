# SPDX-License-Identifier: Apache-2.0
"""The one error that a user is meant to read, what may stand in it, and what is found of a file before it is read."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
LONGEST = 2_000  # characters of a message: a row may hold a number of 4,300 digits, or a name as long as it likes
# C0 and C1 controls, what separates lines, what turns the direction of writing around (CVE-2021-42574), surrogates
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # https://user:token@host
SIGNED = re.compile(r"(?i)([?&;](?:[\w-]*(?:token|secret|signature|password|api_?key|credential)|sig|key)=)[^&\s\"']+")
TOKEN = re.compile(r"\b(hf_|api_org_|ghp_|github_pat_|sk-|xox[abp]-|AKIA)[\w-]{8,}")
ADVICE = re.compile(r"weights_only|trust_remote_code\W{1,7}(set\W{1,3})?(to\W{1,3})?True|TORCH_FORCE_NO_WEIGHTS_ONLY")


def printable(text: str) -> str:
    """A text of one line for a terminal: what would move its cursor, end the line or set colors is written out.

    Most messages name something that comes from outside: a file, a column, a value of a row. Tokens are masked, too.

    >>> printable("train\x1b[2J.jsonl, row 1")
    'train\\\\x1b[2J.jsonl, row 1'
    """
    text = UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], masked(text))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 200]} … {text[-150:]}"


def printable_lines(text: str) -> str:
    """:func:`printable` for a text whose line breaks are ours."""
    return "\n".join(printable(line) for line in text.split("\n"))


def masked(text: str) -> str:
    """A text without the login of a web address, a signature in one, or an access token.

    >>> masked("https://me:hf_secret@host/x?token=abc")
    'https://***@host/x?token=***'
    """
    return TOKEN.sub(r"\1***", SIGNED.sub(r"\1***", LOGIN.sub("***", text)))


class UserError(Exception):
    """Something the user can mend: what was given, where, and what to do. Shown as one line, without a traceback."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class Ended(UserError):
    """The process was asked to end, and the work that is done is kept: exit status 75, as of a training."""


def not_installed(error: ModuleNotFoundError) -> str:
    """What to do about a package that this Python lacks, in a line."""
    top = Path(__file__).resolve().parents[2]
    activate = top / ".venv" / "bin" / "activate"
    if sys.prefix != str(top / ".venv") and activate.is_file():
        advice = f"run . {activate} first"
    else:
        advice = "bash training_scripts/quickstart.sh makes an environment that has it, pip install -e . adds it here"
    return f"error: {sys.executable} has no package {error.name}; {advice}"


def first_line(error: BaseException) -> str:
    """An exception's first line that says something, for a message of one line.

    What Transformers and torch advise is left out where it would run code of a file: nobody should follow a message of
    ours into that.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if ADVICE.search(str(error)):
        is_code = "trust_remote_code" in str(error)
        return REMOTE_CODE if is_code else "it holds more than weights, such as code, of which nothing was run"
    return lines[0].rstrip(":") if lines else type(error).__name__


REMOTE_CODE = "it brings code of its own, which runs only with --trust_remote_code; look at it first"


def why_not(error: BaseException) -> str:
    """An error of Transformers in a line that says what to do."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return REMOTE_CODE
    return first_line(error)


def require_no_lfs_pointer(path: Path) -> None:
    """Raises UserError for a file that a clone without Git LFS has left as a pointer."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull where it was cloned")
