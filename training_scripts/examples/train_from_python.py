#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train from Python: the same run for several learning rates, and which one ranks the held-out pairs best.

python train_from_python.py --model demo/model --data demo/data --output sweep
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's package, installed or not

import reward_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/model", help="a pretrained model: a folder or a hub name")
    parser.add_argument("--data", nargs="+", default=["demo/data"], help="preference data, as main.py's --data_path")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3], help="learning rates to try")
    parser.add_argument("--output", default="sweep", help="the folder that gets a folder for each of them")
    options = parser.parse_args()

    logging.getLogger("reward_model").setLevel(logging.WARNING)  # only what is cut, dropped or ignored
    accuracies = {}
    for rate in options.rates:
        config = reward_model.RunConfig.of(
            model_name_or_path=options.model,
            data_path=options.data,
            learning_rate=rate,
            output_dir=f"{options.output}/{rate:g}",
        )
        result = reward_model.train(config)
        accuracies[rate] = result.metrics["accuracy"]
        print(f"learning rate {rate:g}: held-out accuracy {accuracies[rate]:.4f}, model in {result.folder}")
    print(f"best: {max(accuracies, key=accuracies.get):g}")


if __name__ == "__main__":
    try:
        main()
    except reward_model.UserError as error:
        sys.exit(f"error: {error}")
