# SPDX-License-Identifier: Apache-2.0
"""Training from Python: a notebook, a sweep, somebody's own script."""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING

from reward_model.common import distributed
from reward_model.common.logging import quiet, show_messages
from reward_model.config.options import RunConfig

if TYPE_CHECKING:
    from reward_model.training.run import TrainResult


def train(config: RunConfig) -> TrainResult:
    """Train a reward model as ``main.py`` does with the same flags, and return what it came to.

    It may be called again in the same process. Under ``deepspeed`` or ``torchrun`` every process calls it. What it says
    goes through the logger ``reward_model``.

    >>> import reward_model
    >>> config = reward_model.RunConfig.of(model_name_or_path="demo/model", data_path="demo/data")
    >>> result = reward_model.train(config)  # doctest: +SKIP
    >>> result.metrics["accuracy"]  # doctest: +SKIP
    0.9767

    Raises:
        UserError: whatever the caller can mend: a model that is not there, a row that cannot be used, …
    """
    distributed.prepare_environment()
    show_messages()
    with quiet(config.output.debug):
        from reward_model.training.run import run  # after the environment that DeepSpeed and Transformers read

        atexit.unregister(distributed.end)
        atexit.register(distributed.end)
        return run(config)
