#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh machine to a trained reward model: sets up what is missing, makes a small preference data set and a tiny
# model, trains with `deepspeed main.py`, and evaluates on requests that training never saw.
#
#   bash training_scripts/quickstart.sh [FLAG...]     flags of main.py, e.g. --zero_stage 2
#   DEMO=folder bash training_scripts/quickstart.sh   where data, model and output go (default: demo/ in the checkout)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
# shellcheck source=training_scripts/setup.sh
source "$here/setup.sh"
# shellcheck disable=SC2119  # the flags are for main.py
set_up

demo=${DEMO:-$top/demo}
case $demo in /*) ;; *) demo=$PWD/$demo ;; esac
output=$demo/output
if [ -e "$output" ]; then
  earlier=$output.$(date +%Y%m%d-%H%M%S)
  mv "$output" "$earlier"
  say "an earlier run is kept as $earlier"
fi
say "writing data and a tiny model to $demo"
PYTHONPATH=$top TRANSFORMERS_VERBOSITY=error "$PYTHON" -m reward_model.demo "$demo" >/dev/null

cd "$here"
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# deepspeed.launcher.runner is what the command deepspeed runs.
# 32 pairs a step, 72 steps: one epoch of 2,292 pairs. The model starts from random weights, hence the learning rate.
# --num_gpus 1: without a GPU this is one process on the CPU, which uses all cores.
"$PYTHON" -m deepspeed.launcher.runner --num_gpus 1 --master_port "$port" main.py \
  --model_name_or_path "$demo/model" \
  --data_path "$demo/data" \
  --output_dir "$output" \
  --max_seq_len 256 \
  --per_device_train_batch_size 32 \
  --per_device_eval_batch_size 64 \
  --learning_rate 1e-3 \
  --num_warmup_steps 5 \
  --eval_interval 12 \
  "$@"
