#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on the GPUs of this machine, all or NUM_GPUS of them; without a GPU, in NUM_GPUS processes (one) on the CPU.
#
#   MODEL=name DATA=path bash single_node.sh [FLAG of main.py]...
#   NUM_GPUS=4 GLOBAL_BATCH=64 bash single_node.sh …     64 pairs a step, however many GPUs share them
#   CUDA_VISIBLE_DEVICES=2,3 bash single_node.sh …       on these GPUs
#   LAUNCHER=torchrun bash single_node.sh …              torchrun in place of deepspeed
#   DRY_RUN=1 bash single_node.sh …                      only print the command
set -euo pipefail
here=${SCRIPTS:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"

MODEL=${MODEL:-facebook/opt-350m} # edit these two lines
DATA=${DATA:-Dahoas/rm-static}

NUM_GPUS=${NUM_GPUS:-$(count_gpus)}
require_processes NUM_GPUS "$NUM_GPUS"
find_python
settings "$NUM_GPUS" "$@"
port=${MASTER_PORT:-$(free_port)}
where=(--num_gpus "$NUM_GPUS")
case ${CUDA_VISIBLE_DEVICES:-} in
  '') ;;
  *[!0-9,]*) LAUNCHER=torchrun ;; # names of GPUs, which deepspeed cannot read
  *) if command -v nvidia-smi >/dev/null; then # deepspeed --num_gpus would ignore them
    where=(--include "localhost:$(cut -d, -f1-"$NUM_GPUS" <<<"$CUDA_VISIBLE_DEVICES")")
    unset CUDA_VISIBLE_DEVICES
  fi ;;
esac
case ${LAUNCHER:=deepspeed} in
  # what the command deepspeed runs; without a hostfile, which it else looks for in /job
  deepspeed) run_here -- "$PYTHON" -m deepspeed.launcher.runner --hostfile /dev/null "${where[@]}" --master_port "$port" \
    "$here/main.py" "${FLAGS[@]}" ;;
  torchrun) run_here -- "$PYTHON" -m torch.distributed.run --nproc_per_node "$NUM_GPUS" --master_port "$port" \
    "$here/main.py" "${FLAGS[@]}" ;;
  *) die "LAUNCHER=$LAUNCHER: deepspeed or torchrun" ;;
esac
