#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GPT-2 large (774 million parameters) on the best of four answers, on 8 GPUs of 32 GB: OpenAI's first reward models.
#
#   bash recipes/gpt2-large.sh [FLAG of main.py]...
#   DATA=my.jsonl bash recipes/gpt2-large.sh      rows: prompt, four responses, and scores or ranks with one best
#
# Ziegler et al. 2019 (arXiv 1909.08593) and their code (openai/lm-human-preferences, launch.py): softmax over four
# answers, 5e-5 and 32 questions a step for style (2.5e-5 and 16 for summaries), falling to 0 in a line, one pass, no
# warm-up; scores given standard deviation 1 before and after. The size is the paper's, the code's default is 124 M.
# What differs: AdamW's second beta is 0.95 (theirs 0.999), gradients are clipped to 1, the mean of the scores is taken off
# afterwards alone, and before training the 256 scores are those of training rows (theirs: of the policy's samples).
# Data: UltraFeedback has four answers a question; where two of them are the best, the row is skipped and counted.
# Memory: ZeRO 2, 4Ψ + 16Ψ/N = 4 × 0.77 + 16 × 0.77 / 8 = 5 GB of states; `reward-model plan` says 27 GiB in all for
# two lists of four full texts (that is four pairs to it), and 6 with --gradient_checkpointing.
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-openai-community/gpt2-large}
DATA=${DATA:-openbmb/UltraFeedback}
GLOBAL_BATCH=${GLOBAL_BATCH:-32} # lists = 2 × 2 × 8: micro batch × accumulation × GPUs; theirs for style
MICRO_BATCH=${MICRO_BATCH:-2}    # at most; 1 on GPUs of 16 GB
recipe single_node.sh --loss best_of_k --on_bad_row skip --max_seq_len 1024 --learning_rate 5e-5 \
  --lr_scheduler_type linear --normalize_before --normalize_scores train --zero_stage 2 "$@"
