#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From a fresh machine to a trained reward model: sets up what is missing, makes a small preference data set and a tiny
# model, trains with `deepspeed main.py`, and evaluates on requests that training never saw.
#
#   bash training_scripts/quickstart.sh [FLAG...]     flags of main.py, e.g. --zero_stage 2; --debug shows all that the
#                                                     installers and DeepSpeed print
#   DEMO=folder bash training_scripts/quickstart.sh   where data, model and output go (default: demo/ in the checkout)
set -euo pipefail
case " $* " in
  *" --help "* | *" -h "*) # nothing is set up, moved or written
    sed -n '3,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
# shellcheck source=training_scripts/setup.sh
source "$here/setup.sh"
debug=
case " $* " in *" --debug "*) debug=--debug ;; esac
set_up $debug
# a typo in a flag is told before anything is moved or written
PYTHONPATH=$top "$PYTHON" -m reward_model check --model_name_or_path demo --data_path its/own "$@" >/dev/null

demo=${DEMO:-$top/demo}
case $demo in /*) ;; *) demo=$PWD/$demo ;; esac
output=$demo/output
if [ -e "$output" ]; then
  earlier=$output.$(date +%Y%m%d-%H%M%S)
  mv "$output" "$earlier"
  say "an earlier run is kept as $earlier"
fi
say "writing data and a tiny model to $demo"
PYTHONPATH=$top "$PYTHON" -m reward_model.data.demo "$demo"

# quiet COMMAND...: without the log lines of DeepSpeed's launcher, of which only errors concern a first run
quiet() {
  if [ -n "$debug" ]; then
    "$@"
  else
    "$@" | { grep --line-buffered -vE '^\[[0-9-]+ [0-9:,]+\] \[(INFO|WARNING)\] ' || true; }
  fi
}

cd "$here"
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
say "training with deepspeed main.py"
# deepspeed.launcher.runner is what the command deepspeed runs.
# 32 pairs a step, 72 steps: one epoch of 2,292 pairs. The model starts from random weights, hence the learning rate.
# --num_gpus 1: without a GPU this is one process on the CPU, which uses all cores.
quiet "$PYTHON" -m deepspeed.launcher.runner --num_gpus 1 --master_port "$port" main.py \
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

[ -e "$output/config.json" ] || exit 0 # the flags named another place
cat <<END

Next, score texts of your own, a prompt and a response:
  cd $(printf '%q' "$top")
  echo '{"prompt": "Human: How do I clean a lamp? Assistant:", "response": " Wipe it with a damp cloth."}' |
    $(printf '%q' "$PYTHON") -m reward_model score $(printf '%q' "$output")
see how right the model is, on pairs that it has not seen:
  $(printf '%q' "$PYTHON") -m reward_model evaluate $(printf '%q' "$output") --data $(printf '%q' "$demo/data/eval.jsonl")
and train on your own pairs, lines like {"prompt": "…", "chosen": "…", "rejected": "…"} in a file:
  cd $(printf '%q' "$here")
  $(printf '%q' "$PYTHON") main.py --model_name_or_path $(printf '%q' "$demo/model") --learning_rate 1e-3 \\
    --data_path $(printf '%q' "$demo/data/train.jsonl") --output_dir $(printf '%q' "$demo/second")
with your file as --data_path, and a pretrained model, its hub name or folder, in place of the tiny one.
END
