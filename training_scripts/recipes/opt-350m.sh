#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# OPT-350m, full fine-tuning, no ZeRO, on 8 GPUs of 16 GB: DeepSpeed-Chat's opt/single_node/run_350m.sh, step 2.
#
#   bash recipes/opt-350m.sh [FLAG of main.py]...
#   LAUNCH=single_gpu.sh bash recipes/opt-350m.sh …     the same 32 pairs a step on one GPU
#
# Numbers and data are upstream's. What differs: the loss is that of the end scores (add --loss_level token for one per
# token, as upstream's), bf16 where the GPU has it (upstream: fp16), and all evaluation rows (upstream: 100 batches).
# Upstream's --num_padding_at_beginning 1 and --deepspeed are left out: they change nothing here.
# Memory: 16 bytes a parameter × 0.33 billion = 5 GB of states; `reward-model plan` says 10 GiB in all.
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-facebook/opt-350m}
data=(--data_path Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise
  yitingxie/rlhf-reward-datasets --data_split '2,4,4')
[ -z "${DATA:-}" ] || data=()     # yours, and all of its rows
GLOBAL_BATCH=${GLOBAL_BATCH:-32}  # pairs = 4 × 1 × 8: micro batch × accumulation × GPUs; upstream's on a node of 8
MICRO_BATCH=${MICRO_BATCH:-4}     # at most; upstream's. 16 fit on a GPU of 24 GB and change nothing but the speed
recipe single_node.sh "${data[@]}" --max_seq_len 512 --learning_rate 5e-5 --weight_decay 0.1 --dropout 0.0 \
  --num_train_epochs 1 --lr_scheduler_type cosine --num_warmup_steps 0 --seed 1234 --per_device_eval_batch_size 4 \
  --zero_stage 0 "$@"
