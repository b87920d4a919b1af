#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up what is missing and run the tests.
#
#   bash tests/run.sh                      all but the slow ones
#   bash tests/run.sh --all                the slow ones too
#   bash tests/run.sh tests/test_demo.py   any other argument goes to pytest
#   DEEPSPEED_EXAMPLES=folder bash tests/run.sh      also compares with upstream's own files in a checkout
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=training_scripts/setup.sh
source "$top/training_scripts/setup.sh"
set_up --dev
cd "$top"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet . || die "not formatted: run ruff format ."
lint-imports >/dev/null || { lint-imports && die "a room imports from one above it"; }
"$PYTHON" -m mypy --no-error-summary || die "the types do not fit"
# a file stays with one process, for the fixtures that its tests share; conftest.py says which files begin. One process
# more than there are cores, as many tests wait for processes of their own
exec "$PYTHON" -m pytest --dist loadfile --no-loadscope-reorder -n "$(($(nproc) < 8 ? $(nproc) + 1 : 8))" "$@"
