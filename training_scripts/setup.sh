# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by quickstart.sh, tests/run.sh and the launchers. set_up leaves in $PYTHON an interpreter that has all the
# trainer needs; what it does for that, and when, is told at the top of set_up.py. Set PYTHON to start from another one.

say() { printf '%s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

set_up_script=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/set_up.py

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
version_of() { "$1" --version 2>&1 | tail -n 1; }

# lacking INTERPRETER: the packages that it lacks, on one line
lacking() {
  if is_recent "$1"; then
    "$1" "$set_up_script" --lacking
  else
    printf 'Python 3.10 or newer (it is %s)\n' "$(version_of "$1")"
  fi
}

# set_up [--dev] [--debug]
set_up() {
  local base=${PYTHON:-}
  if [ -z "$base" ]; then
    base=$(command -v python3 || command -v python) || die "no python3: install Python 3.10 or newer"
  fi
  command -v "$base" >/dev/null || die "no interpreter $base"
  is_recent "$base" || die "$base is $(version_of "$base"): 3.10 or newer is needed (set PYTHON)"
  PYTHON=$("$base" "$set_up_script" "$@") || exit 1
  PATH=$(dirname "$PYTHON"):$PATH
  export PYTHON PATH
}
