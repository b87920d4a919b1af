#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-3-8B-Instruct, LoRA, on one GPU of 80 GB; with MICRO_BATCH=1 on one of 24 GB.
#
#   bash recipes/llama-3-8b-lora.sh [FLAG of main.py]...
#
# Dimension 32, alpha 16, rate 1e-4 and 2,048 tokens: TRL's examples/scripts/reward_modeling.py, whose model is smaller
# (Qwen2-0.5B). 1e-4 is also about ten times OpenRLHF's 9e-6 for all weights of this model, the ratio of "LoRA Without
# Regret" (2025; from memory). --learning_rate is the head's. Every linear layer has adapters; TRL's default is fewer.
# Data: chat messages, which go through the model's template; RewardBench 2's reward models were trained on it too.
# Memory: 2Ψ = 2 × 7.5 = 15 GB frozen, and 16 bytes for each of 84 million adapter weights, 1.3 GB; `reward-model plan`
# says 26 GiB with 4 pairs and 20 with one. One GPU has nothing to share, so no ZeRO.
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}
DATA=${DATA:-Skywork/Skywork-Reward-Preference-80K-v0.2}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}  # pairs = 4 × 16 × 1: micro batch × accumulation × GPUs; InstructGPT's 64 prompts
MICRO_BATCH=${MICRO_BATCH:-4}     # at most; 8 need 34 GiB
recipe single_gpu.sh --max_seq_len 2048 --lora_dim 32 --lora_alpha 16 --lora_learning_rate 1e-4 --learning_rate 1e-4 \
  --zero_stage 0 --gradient_checkpointing "$@"
