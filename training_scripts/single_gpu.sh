#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on one GPU; on the CPU where there is none.
#
#   MODEL=name DATA=path bash single_gpu.sh [FLAG of main.py]...
#   CUDA_VISIBLE_DEVICES=3 bash single_gpu.sh …     on that GPU
#   DRY_RUN=1 bash single_gpu.sh …                  only print the command
set -euo pipefail
here=${SCRIPTS:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }

export MODEL=${MODEL:-facebook/opt-350m} # edit these two lines
export DATA=${DATA:-Dahoas/rm-static}

NUM_GPUS=1 exec bash "$here/single_node.sh" "$@"
