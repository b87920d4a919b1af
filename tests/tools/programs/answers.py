# SPDX-License-Identifier: Apache-2.0
"""A program's question and answer, in files that the command line names."""

import json
import sys
from pathlib import Path


def question():
    return json.loads(Path(sys.argv[1]).read_text())


def answer(**values):
    Path(sys.argv[2]).write_text(json.dumps(values))
