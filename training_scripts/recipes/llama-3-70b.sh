#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-3-70B-Instruct, full fine-tuning, ZeRO 3 on 4 nodes of 8 GPUs of 80 GB.
#
#   HOSTFILE=hosts bash recipes/llama-3-70b.sh [FLAG of main.py]...
#   LAUNCH=slurm.sbatch SBATCH_OPTIONS='--nodes 4' bash recipes/llama-3-70b.sh
#
# Llama 2's reward model of 70 B: 5e-6, 512 pairs, one epoch, cosine, 3 % warm-up of at least 5 steps (arXiv 2307.09288,
# section 3.2.2; their cosine ends at a tenth, this one at 0). RewardBench 2's Llama-3.1-70B has 3e-6 (model card).
# Warm-up: 77,000 rows (from memory), of which a tenth is held out, / 512 = 135 steps; 3 % of them are 4, so 5.
# Memory: ZeRO 3, 18Ψ/N = 18 × 69.5 / 32 = 39 GB of states and what is gathered; `reward-model plan` says 55 GiB in all.
# On 2 nodes it would be 89: add --offload (21, and 650 GiB of each node's memory).
# A slow network between the nodes: --deepspeed_config zeropp.json sends half and needs 72 GiB.
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-meta-llama/Meta-Llama-3-70B-Instruct}
DATA=${DATA:-Skywork/Skywork-Reward-Preference-80K-v0.2}
GLOBAL_BATCH=${GLOBAL_BATCH:-512} # pairs = 2 × 8 × 32: micro batch × accumulation × GPUs; Llama 2's
MICRO_BATCH=${MICRO_BATCH:-2}     # at most; 4 need 70 GiB and send half as much
recipe multi_node.sh --max_seq_len 2048 --learning_rate 5e-6 --num_warmup_steps 5 --zero_stage 3 \
  --gradient_checkpointing "$@"
