# SPDX-License-Identifier: Apache-2.0
"""Let libraries speak only when something is wrong."""

from __future__ import annotations

import logging
import os
import warnings


def quieten(debug: bool) -> None:
    """Lower the voices of DeepSpeed, Transformers and datasets, unless ``debug``; before they are imported."""
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|transformers|peft|deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
