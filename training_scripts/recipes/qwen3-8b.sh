#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Qwen3-8B, full fine-tuning, ZeRO 2 on 8 GPUs of 80 GB.
#
#   bash recipes/qwen3-8b.sh [FLAG of main.py]...
#
# No source for this very model: rate, batch, one epoch, cosine and 3 % warm-up are OpenRLHF's for Llama-3-8b
# (examples/scripts/train_rm.sh; model card of OpenRLHF/Llama-3-8b-rm-700k). Others of this size are lower:
# RewardBench 2's best on Tulu 3 8B has 3e-6 (model card), RLHFlow 2e-6 at 512 pairs (bradley-terry-rm/llama3_rm.py).
# Warm-up: 77,000 rows (from memory), of which a tenth is held out, / 256 = 270 steps; 3 % of them are 8.
# Memory: ZeRO 2, 4Ψ + 16Ψ/N = 4 × 7.6 + 16 × 7.6 / 8 = 46 GB of states, which is DeepSpeed's estimate and high;
# `reward-model plan` says 41 GiB in all, and 29 for --zero_stage 3, which sends 2.7 times as much in 8 passes a step.
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-Qwen/Qwen3-8B}
DATA=${DATA:-Skywork/Skywork-Reward-Preference-80K-v0.2}
GLOBAL_BATCH=${GLOBAL_BATCH:-256} # pairs = 4 × 8 × 8: micro batch × accumulation × GPUs; OpenRLHF's
MICRO_BATCH=${MICRO_BATCH:-4}     # at most; 2 for --max_seq_len 4096
recipe single_node.sh --max_seq_len 2048 --learning_rate 9e-6 --num_warmup_steps 8 --zero_stage 2 \
  --gradient_checkpointing "$@"
