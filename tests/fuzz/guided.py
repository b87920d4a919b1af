# SPDX-License-Identifier: Apache-2.0
"""The properties of test_hostile_input.py under atheris, which changes inputs that reached new code of ours.

python tests/fuzz/guided.py lines -atheris_runs=10000        any flag of libFuzzer's follows
python tests/fuzz/guided.py lines -max_total_time=600
"""

import atexit
import shutil
import sys
from pathlib import Path

import atheris

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers"), str(TESTS)]

with atheris.instrument_imports(include=["reward_model"]):
    import reward_model.config.options
    import reward_model.data.preprocessing
    import reward_model.inference  # noqa: F401

import test_hostile_input as properties


def main():
    name, *flags = sys.argv[1:]
    properties.PLACE.mkdir(mode=0o700, exist_ok=True)
    atexit.register(shutil.rmtree, properties.PLACE, ignore_errors=True)
    take = properties.tried(name, 1).hypothesis.fuzz_one_input
    atheris.Setup([sys.argv[0], "-len_control=0", "-max_len=4096", "-print_final_stats=1", *flags], take)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
