#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# OPT-1.3b, full fine-tuning, ZeRO 2 on 8 GPUs of 24 GB.
#
#   bash recipes/opt-1.3b.sh [FLAG of main.py]...
#
# Upstream has no step 2 for this size. Learning rate: what DeepSpeed-Chat takes for OPT-1.3b in step 1
# (opt/single_node/run_1.3b.sh) and for Llama-2-7b in step 2; dropout, weight decay and length as its step 2 for OPT.
# Stiennon et al. 2020 (arXiv 2009.01325) trained reward models of this size at 64 pairs, one epoch, cosine; their rate,
# 1.5e-5, is from memory.
# Memory: ZeRO 2, 4Ψ + 16Ψ/N = 4 × 1.3 + 16 × 1.3 / 8 = 8 GB of states; `reward-model plan` says 18 GiB in all.
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-facebook/opt-1.3b}
DATA=${DATA:-Dahoas/rm-static}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}  # pairs = 8 × 1 × 8: micro batch × accumulation × GPUs; Stiennon et al. 2020
MICRO_BATCH=${MICRO_BATCH:-8}     # at most; with --gradient_checkpointing 8 need 8 GiB
recipe single_node.sh --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0.1 --dropout 0.0 --zero_stage 2 "$@"
