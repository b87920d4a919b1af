#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# DeBERTa-v3-large, an encoder, on ranked lists, on one GPU of 24 GB: OpenAssistant's kind of reward model.
#
#   bash recipes/deberta-v3-large.sh [FLAG of main.py]...
#   MODEL=nghuyong/ernie-2.0-large-en bash recipes/deberta-v3-large.sh      the same for ERNIE
#
# Open-Assistant's model/reward/instructor/configs/deberta-v3-large.yml: 1e-5, 32 questions a step, cosine, 600 steps of
# warm-up, 512 tokens, pairs of prompt and answer. Theirs are two passes; this is one, and the warm-up 3 % of it, as
# InstructGPT found more passes harmful, whose loss over all pairs of a list (rank_list) this is.
# Data: Nectar ranks seven answers to each of 183,000 questions (from memory); a tenth is held out.
# Memory: 16 bytes a parameter × 0.43 billion = 7 GB of states; `reward-model plan` says 11 GiB in all
# for two lists of seven full texts (seven pairs to it).
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-microsoft/deberta-v3-large}
DATA=${DATA:-berkeley-nest/Nectar}
GLOBAL_BATCH=${GLOBAL_BATCH:-32} # lists = 2 × 16 × 1: micro batch × accumulation × GPUs; Open-Assistant's
MICRO_BATCH=${MICRO_BATCH:-2}    # at most
recipe single_gpu.sh --loss rank_list --max_seq_len 512 --learning_rate 1e-5 --warmup_ratio 0.03 \
  --gradient_checkpointing --zero_stage 0 "$@"
