# SPDX-License-Identifier: Apache-2.0
"""A program's questions and its answers, in files that the command line names."""

import json
import sys
from pathlib import Path


def answer_all(function):
    """Write what a function returns for each question, a dict; questions without an answer end the program."""
    questions = json.loads(Path(sys.argv[1]).read_text())
    answers = [function(question) for question in questions]
    Path(sys.argv[2]).write_text(json.dumps(answers))
