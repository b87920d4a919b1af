#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train a reward model.

deepspeed main.py --model_name_or_path facebook/opt-350m --data_path Dahoas/rm-static --output_dir output
deepspeed --num_gpus 2 main.py …          two GPUs (or, without a GPU, two processes)
torchrun --nproc_per_node 2 main.py …     the same through torchrun
python main.py …                          one process, no launcher
python main.py --config run.yaml          flags from a file
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout's package, installed or not

try:
    from reward_model.commands.train import main
except ModuleNotFoundError as error:
    from reward_model.common.errors import not_installed

    sys.exit(not_installed(error))

if __name__ == "__main__":
    sys.exit(main())
