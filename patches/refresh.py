#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Write the files that the patches add into the patches again: ``python patches/refresh.py`` after a change of one.

The drop-in comes from ``reward_model/reward_model.py``, the others from ``patches/added/``. Upstream is not needed.
"""

import hashlib
import re
from pathlib import Path

PATCHES = Path(__file__).resolve().parent
DROP_IN = PATCHES.parent / "reward_model" / "reward_model.py"
NEW_FILE = re.compile(
    r"^diff --git a/(?P<path>\S+) b/(?P=path)\nnew file mode 100644\n.*?(?=^diff --git |\Z)", re.MULTILINE | re.DOTALL
)


def source(path: str) -> Path:
    """Where the text of an added file is kept; ``path`` is its place in upstream's tree."""
    name = path.split("/utils/", 1)[1]
    return DROP_IN if name == "model/reward_model.py" else PATCHES / "added" / name


def section(path: str) -> str:
    """The part of a patch that adds a file, as ``git format-patch --full-index`` writes it."""
    text = source(path).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
    lines = text.decode().splitlines(keepends=True)
    return (
        f"diff --git a/{path} b/{path}\nnew file mode 100644\nindex {'0' * 40}..{blob}\n"
        f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}" for line in lines)
    )


def renewed(patch: str) -> str:
    """A patch with its added files as they are now."""
    return NEW_FILE.sub(lambda found: section(found["path"]), patch)


def main() -> None:
    for file in sorted(PATCHES.rglob("[0-9]*.patch")):
        old = file.read_text()
        new = renewed(old)
        if new != old:
            file.write_text(new)
            print(f"renewed {file.relative_to(PATCHES)}")


if __name__ == "__main__":
    main()
