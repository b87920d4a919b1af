# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a checkout of DeepSpeedExamples: the lines that the patches quote, in their places, filler between."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import NamedTuple

PATCHES = Path(__file__).resolve().parents[2] / "patches"
SECTION = re.compile(r"diff --git a/(\S+) b/(\S+)\n")
INDEX = re.compile(r"^index ([0-9a-f]+)\.\.([0-9a-f]+)(?: (\d+))?$", re.MULTILINE)
HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@.*\n((?:[-+ ].*\n)*)", re.MULTILINE)


class Hunk(NamedTuple):
    old_start: int
    new_start: int
    lines: list[str]  # with their marks: space, minus or plus

    def side(self, mark):
        """Line number to text, before ("-") or after ("+")."""
        start = self.old_start if mark == "-" else self.new_start
        return dict(enumerate((line[1:] for line in self.lines if line[0] in (" ", mark)), start))


class Section(NamedTuple):
    old: str  # its path
    new: str
    added: bool
    blobs: tuple[str, str] | None  # before and after; a pure rename states none
    mode: int
    hunks: list[Hunk]


def series(layout):
    """The patches of a layout, in order."""
    return sorted((PATCHES if layout == "package" else PATCHES / layout).glob("[0-9]*.patch"))


def sections(patch):
    """What a patch says of each file."""
    return [_section(part) for part in re.split(r"^(?=diff --git )", patch.read_text(), flags=re.MULTILINE)[1:]]


def _section(part):
    path, index, added = SECTION.match(part), INDEX.search(part), "\nnew file mode " in part
    hunks = [Hunk(int(old), int(new), lines.splitlines()) for old, new, lines in HUNK.findall(part)]
    mode = int(index[3] or "100644", 8) & 0o777 if index else 0o644
    return Section(path[1], path[2], added, (index[1], index[2]) if index else None, mode, hunks)


def newest(layout):
    """The patches without those that mend an older version: each starts from the blob that one before it left."""
    chosen, blob = [], {}
    for patch in series(layout):
        changed = [section for section in sections(patch) if section.blobs]
        if all(section.added or blob.get(section.old, section.blobs[0]) == section.blobs[0] for section in changed):
            chosen.append(patch)
            blob.update((section.new, section.blobs[1]) for section in changed)
        else:
            assert "\nOnly-Where: " in patch.read_text(), f"{patch.name} does not start where those before it end"
    return chosen


def before(known, hunks):
    """Line number to text before the hunks, from what is known of the file after them."""
    quoted = {number: text for hunk in hunks for number, text in hunk.side("+").items()}
    assert all(quoted.get(number, text) == text for number, text in known.items()), "two patches contradict each other"
    earlier = {}
    for number in known.keys() - quoted.keys():
        grown = sum(len(h.side("+")) - len(h.side("-")) for h in hunks if h.new_start <= number)
        earlier[number - grown] = known[number]
    for hunk in hunks:
        earlier.update(hunk.side("-"))
    return earlier


def originals(patches):
    """The text and the mode of every file of upstream's that the patches change, by path."""
    known, modes = {}, {}
    for patch in reversed(patches):
        earlier = dict(known)
        for section in sections(patch):
            earlier.pop(section.new, None)
        for section in sections(patch):
            if not section.added:
                earlier[section.old] = before(known.get(section.new, {}), section.hunks)
                modes[section.old] = section.mode
        known = earlier
    return {path: (_filled(lines), modes[path]) for path, lines in known.items()}


def _filled(lines):
    return "".join(f"{lines.get(n, f'pass  # line {n}')}\n" for n in range(1, max(lines, default=20) + 1))


def blob_id(text):
    """As ``git hash-object`` has it."""
    return hashlib.sha1(b"blob %d\0" % len(text.encode()) + text.encode()).hexdigest()


def make(folder, layout="package", patches=None):
    """A tree at ``folder/tree``; at ``folder/patches`` the tool, the patches, and an UPSTREAM with the tree's blobs.

    ``patches``: some of the series, in order, all for one version. Lines that the others add count as upstream's.
    """
    for file in (PATCHES / "apply.sh", *(patches or series(layout))):
        to = folder / "patches" / file.relative_to(PATCHES)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    listed = []
    for path, (text, mode) in originals(patches or newest(layout)).items():
        file = folder / "tree" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)
        listed.append(f"{layout} {blob_id(text)} 01234567 2026-01-31 {path}\n")
    (folder / "patches" / "UPSTREAM").write_text("".join(listed))
