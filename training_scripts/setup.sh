# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by quickstart.sh and tests/run.sh: leaves in $PYTHON an interpreter that has all the trainer needs.
#
# The current interpreter is used as it is when it has everything. Otherwise .venv is made at the top of the checkout;
# a torch that the current interpreter has is kept (it fits the machine's driver), else one is installed: the CPU build
# where there is no GPU. Set PYTHON to start from another interpreter.

say() { printf '%s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# missing INTERPRETER MODULE...: the modules that it cannot find, on one line
missing() {
  "$1" - "${@:2}" <<'PY'
import sys
sys.path.remove("")  # a folder named datasets where the user stands is not the module
from importlib.util import find_spec
if sys.version_info < (3, 10):
    sys.exit(f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed (set PYTHON)")
print(*[name for name in sys.argv[1:] if find_spec(name) is None])
PY
}

# set_up [MODULE|MODULE=PACKAGE...]: modules beyond those of the trainer, and the package where it has another name
set_up() {
  local top modules lacking base
  top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  modules=(torch deepspeed transformers datasets peft filelock huggingface_hub matplotlib ninja numpy pyarrow
    tensorboard tqdm "${@%%=*}")
  base=${PYTHON:-}
  if [ -z "$base" ]; then
    base=$(command -v python3 || command -v python) || die "no python3: install Python 3.10 or newer"
  fi
  # a full path, its links kept: an environment's python is one
  base=$(cd "$(dirname "$(command -v "$base")")" && pwd)/${base##*/} || die "no interpreter $base"
  lacking=$(missing "$base" "${modules[@]}") || die "cannot use $base"
  if [ -z "$lacking" ]; then
    PYTHON=$base
  else
    PYTHON=$top/.venv/bin/python
    if [ ! -x "$PYTHON" ] || [ -n "$(missing "$PYTHON" "${modules[@]}")" ]; then
      make_environment "$top" "$base" "${@#*=}"
    fi
  fi
  command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null ||
    die "no C++ compiler, and DeepSpeed compiles an op when it starts: install one, e.g. apt install g++"
  PATH=$(dirname "$PYTHON"):$PATH
  export PYTHON PATH
}

make_environment() {
  local top=$1 base=$2 torch pin extra=()
  shift 2
  say "setting up $top/.venv, once: a few minutes, about 1.5 GB on disk without a GPU's libraries"
  torch=$("$base" -c 'import torch; print(torch.__version__)' 2>/dev/null || true)
  [ -z "$torch" ] || extra=(--system-site-packages)
  [ -x "$PYTHON" ] || "$base" -m venv "${extra[@]}" "$top/.venv" ||
    die "python3 -m venv failed: install it, e.g. apt install python3-venv"
  pip_install numpy # before torch, which warns without it
  [ -n "$torch" ] || install_torch
  # whatever torch is there stays
  pin=$("$PYTHON" -c 'import torch; print("torch==" + torch.__version__)') || die "torch does not import in $top/.venv"
  printf '%s\n' "$pin" >"$top/.venv/torch.txt"
  pip_install -r <(requirements "$top") -c "$top/constraints.txt" -c "$top/.venv/torch.txt" "$@" ||
    die "pip could not install what the trainer needs"
}

# The CPU build where there is no GPU and an index that has it can be reached; PyPI's build otherwise.
install_torch() {
  local version=2.13.0
  if ! command -v nvidia-smi >/dev/null || ! nvidia-smi >/dev/null 2>&1; then
    if pip_install uv && UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=120 "$PYTHON" -m uv pip install --quiet \
      --python "$PYTHON" --torch-backend cpu "torch==$version" 2>/dev/null; then
      return
    fi
  fi
  pip_install "torch==$version" || die "pip could not install torch $version"
}

pip_install() { "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"; }

# requirements TOP: the dependencies of pyproject.toml but torch, one a line
requirements() {
  "$PYTHON" - "$1/pyproject.toml" <<'PY'
import re, sys
text = open(sys.argv[1], encoding="utf-8").read()
block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE).group(1)
print(*[r for r in re.findall(r'"([^"]+)"', block) if not r.startswith("torch>")], sep="\n")
PY
}
