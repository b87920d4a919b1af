# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the launchers: an interpreter, the flags of main.py, and the words that start the processes of a node.
# What a launcher reads from its environment is told in training_scripts/README.md, under "Launchers".

GRACE=${GRACE:-600} # seconds that a run which is asked to end has to save a checkpoint
export GRACE

scripts=${SCRIPTS:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
# shellcheck source=training_scripts/setup.sh
source "$scripts/setup.sh"
[[ $GRACE =~ ^[0-9]{1,8}$ ]] || die "GRACE=$GRACE is not a number of seconds"

# quoted WORD...: a line that a shell would read as these words
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# find_python: the environment's interpreter in PYTHON; a launcher installs nothing
find_python() {
  local candidate why
  for candidate in "${PYTHON:-python3}" "$scripts/../.venv/bin/python"; do
    why="is not there"
    if candidate=$(command -v "$candidate"); then
      why=$(lacking "$candidate")
      if [ -z "$why" ]; then
        PYTHON=$(cd "$(dirname "$candidate")" && pwd)/${candidate##*/}
        return
      fi
      why="lacks $why"
    fi
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON $why"
  done
  die "no Python with all that the trainer needs: activate yours, or run quickstart.sh, which makes .venv"
}

# given FLAG WORD...: the value of a flag among main.py's, the last one if it is there twice; fails if it is not there
given() {
  local flag=$1 value found=1 name
  shift
  while [ $# -gt 0 ]; do
    name=${1%%=*}
    case $name in --*) name=${name#--} name=--${name//-/_} ;; esac # --output-dir is --output_dir
    if [ "$name" = "$flag" ]; then
      found=0
      case $1 in *=*) value=${1#*=} ;; *) value=${2:-} ;; esac
    fi
    shift
  done
  printf '%s\n' "${value:-}"
  return "$found"
}

# settings PROCESSES FLAG...: main.py's flags in FLAGS, those given last, so that they win; OUTPUT is a full path
settings() {
  local processes=$1 value words
  shift
  if given --config "$@" >/dev/null; then # what the file says is known here, and other hosts need no copy of it
    words=$(PYTHONPATH=$scripts/..${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m reward_model check --expand "$@") || exit 1
    eval "set -- $words"
  fi
  ! value=$(given --output_dir "$@") || OUTPUT=$value
  OUTPUT=${OUTPUT:-output}
  case $OUTPUT in /*) ;; *) OUTPUT=$PWD/$OUTPUT ;; esac
  FLAGS=()
  given --model_name_or_path "$@" >/dev/null || FLAGS+=(--model_name_or_path "$MODEL")
  given --data_path "$@" >/dev/null || FLAGS+=(--data_path "$DATA")
  given --output_dir "$@" >/dev/null || FLAGS+=(--output_dir "$OUTPUT")
  given --gradient_accumulation_steps "$@" >/dev/null || batch_flags "$processes" "$@"
  FLAGS+=("$@")
}

# batch_flags PROCESSES FLAG...: GLOBAL_BATCH = micro batch × accumulation × processes, with the micro batch of the flags,
# or one of MICRO_BATCH at most
batch_flags() {
  local processes=$1 each micro fixed
  fixed=$(given --per_device_train_batch_size "${@:2}") || fixed=
  if ! is_count "${GLOBAL_BATCH:-1}" || ! is_count "${MICRO_BATCH:-1}"; then
    die "GLOBAL_BATCH and MICRO_BATCH are whole numbers above 0"
  fi
  if [ -z "${GLOBAL_BATCH:-}" ]; then
    [ -z "${MICRO_BATCH:-}" ] || [ -n "$fixed" ] || FLAGS+=(--per_device_train_batch_size "$MICRO_BATCH")
    return
  fi
  each=$((GLOBAL_BATCH / processes))
  [ $((each * processes)) = "$GLOBAL_BATCH" ] ||
    die "GLOBAL_BATCH=$GLOBAL_BATCH cannot be shared by $processes processes: take a multiple of $processes"
  if is_count "$fixed"; then
    [ $((each % fixed)) = 0 ] ||
      die "--per_device_train_batch_size $fixed × $processes processes does not divide GLOBAL_BATCH=$GLOBAL_BATCH"
    FLAGS+=(--gradient_accumulation_steps $((each / fixed)))
    return
  fi
  micro=$((each < ${MICRO_BATCH:-16} ? each : ${MICRO_BATCH:-16}))
  while [ $((each % micro)) != 0 ]; do
    micro=$((micro - 1))
  done
  FLAGS+=(--per_device_train_batch_size "$micro" --gradient_accumulation_steps $((each / micro)))
}

# is_count TEXT: whether it is a whole number above 0 that this shell can compute with
is_count() {
  case $1 in '' | *[!0-9]* | 0* | ??????????*) return 1 ;; esac
}

# require_processes WHAT NUMBER: no machine has more processors than this, and starting so many would end it
most_processes=1024
require_processes() {
  case $2 in '' | *[!0-9]* | 0*) die "$1=$2 is not a number of GPUs" ;; esac
  if ! is_count "$2" || [ "$2" -gt $most_processes ]; then
    die "$1=$2: more than $most_processes processes on a machine"
  fi
}

# count_gpus: those that a run here may use; 1 where there is none, for a process on the CPU
count_gpus() {
  local all
  command -v nvidia-smi >/dev/null && all=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || all=0
  if [ "$all" = 0 ]; then
    printf '1\n'
  elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
  else
    printf '%s\n' "$all"
  fi
}

free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# check_flags: what a look at them shows, before any process starts and before a log is written
check_flags() {
  PYTHONPATH=$scripts/..${PYTHONPATH:+:$PYTHONPATH} "$PYTHON" -m reward_model check "${FLAGS[@]}" >/dev/null || exit 1
}

# run_here [OPTION of supervise.py]... -- COMMAND...: in place of this shell; what it prints goes to OUTPUT/training.log too
run_here() {
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  if is_dry; then
    quoted "$@"
    check_flags
    exit
  fi
  check_flags
  mkdir -p "$OUTPUT"
  quoted "$@" >>"$OUTPUT/training.log"
  exec "$PYTHON" "$scripts/supervise.py" --log "$OUTPUT/training.log" --finished "$OUTPUT/finished.json" \
    --grace "$GRACE" "${options[@]}" "$@"
}

# recipe LAUNCHER FLAG...: start LAUNCH, or else this launcher, with a recipe's settings
recipe() {
  local launch=${LAUNCH:-$1} options
  shift
  export MODEL DATA GLOBAL_BATCH MICRO_BATCH
  case $launch in
    single_gpu.sh | single_node.sh | multi_node.sh | slurm.sbatch) ;;
    *) die "LAUNCH=$launch: single_gpu.sh, single_node.sh, multi_node.sh or slurm.sbatch" ;;
  esac
  if [ "$launch" = slurm.sbatch ] && ! is_dry; then
    read -ra options <<<"${SBATCH_OPTIONS:-}" # e.g. --nodes 4 --account mine
    SCRIPTS=$scripts exec sbatch --export=ALL "${options[@]}" "$scripts/$launch" "$@"
  fi
  SCRIPTS=$scripts exec bash "$scripts/$launch" "$@"
}

is_dry() {
  case ${DRY_RUN:-0} in 0 | no | false) return 1 ;; esac
}
