#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Llama-2-7b, full fine-tuning, ZeRO 3 on 8 GPUs of 80 GB: DeepSpeed-Chat's llama2/run_llama2_7b.sh, step 2.
#
#   bash recipes/llama-2-7b.sh [FLAG of main.py]...
#   LAUNCH=slurm.sbatch SBATCH_OPTIONS='--nodes 2 --time 8:00:00' bash recipes/llama-2-7b.sh
#
# Numbers are upstream's. What differs: all rows (upstream: --data_split 2,4,4), the loss of the end scores, and no
# --offload, which 8 × 80 GB do not need. Meta's own reward models of Llama 2 took 1e-5, 512 pairs and 3 % warm-up
# (arXiv 2307.09288, section 3.2.2); an early examples/scripts/train_rm_llama.sh of OpenRLHF 9e-6 and 128.
# Memory: ZeRO 3, 18Ψ/N = 18 × 6.6 / 8 = 15 GB of states and what is gathered; `reward-model plan` says 21 GiB in all,
# and 31 for --zero_stage 2, which sends a third less.
set -euo pipefail
here=${SCRIPTS:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"
MODEL=${MODEL:-meta-llama/Llama-2-7b-hf}
DATA=${DATA:-Dahoas/rm-static}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}  # pairs = 8 × 1 × 8: micro batch × accumulation × GPUs; upstream's on a node of 8
MICRO_BATCH=${MICRO_BATCH:-8}     # at most; upstream's. On GPUs of 24 GB 2
recipe single_node.sh --max_seq_len 512 --learning_rate 9.65e-6 --weight_decay 0.1 --zero_stage 3 \
  --gradient_checkpointing "$@"
