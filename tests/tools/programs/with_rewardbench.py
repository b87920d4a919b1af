# SPDX-License-Identifier: Apache-2.0
"""rewardbench's own runner on a folder, with rows of a JSON file, on a CPU."""

import sys
import types
from importlib.metadata import version

from answers import answer, question
from transformers import BatchEncoding

to = BatchEncoding.to  # its pipeline says "cuda" in any case
BatchEncoding.to = lambda self, device, **rest: to(self, "cpu" if device == "cuda" else device, **rest)

if __name__ == "__main__":
    asked = question()
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))
    from rewardbench.rewardbench import Args, rewardbench

    flags = {"dataset": asked["rows"], "load_json": True, "not_quantized": True, "torch_dtype": asked["dtype"]}
    rewardbench(Args(model=asked["folder"], output_dir=asked["output"], batch_size=4, max_length=512, **flags))
    answer(version=version("rewardbench"), transformers=version("transformers"))
