#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train on several hosts. Run it on one of them, or on a machine that reaches them by ssh without a password.
#
#   HOSTFILE=hosts MODEL=name DATA=path bash multi_node.sh [FLAG of main.py]...
#   DRY_RUN=1 HOSTFILE=hosts bash multi_node.sh …     only print the command of every host
#
# The hostfile is DeepSpeed's: a line "name slots=8" for each host. Python, this checkout, the current folder and the
# output folder have the same path on all of them, as on a shared file system. With pdsh every host runs DeepSpeed's
# launcher; without it, or with LAUNCHER=torchrun, torchrun, started by ssh.
set -euo pipefail
here=${SCRIPTS:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
[ -e "$here/launch.sh" ] || { echo "error: no launch.sh: set SCRIPTS to <checkout>/training_scripts" >&2 && exit 1; }
# shellcheck source=training_scripts/launch.sh
source "$here/launch.sh"

MODEL=${MODEL:-facebook/opt-350m} # edit these two lines
DATA=${DATA:-Dahoas/rm-static}

HOSTFILE=${HOSTFILE:-hostfile}
MASTER_PORT=${MASTER_PORT:-29500}
soon=1 # seconds between the end of the first host to fail and that of the others: less than they wait to complain too
run=$(date +%Y%m%d-%H%M%S)-$$
ssh=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o ControlMaster=no -o ControlPath=none
  -o ServerAliveInterval=5 -o ServerAliveCountMax=3) # a host that is gone is noticed after 15 seconds
read -ra more <<<"${SSH_OPTIONS:-}"
ssh+=("${more[@]}")

# read_hostfile: the arrays hosts and slots
read_hostfile() {
  local line number=0
  [ -f "$HOSTFILE" ] || die "no hostfile $HOSTFILE: write a line \"name slots=8\" for each host, and set HOSTFILE"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%%#*}
    [ -n "${line//[[:space:]]/}" ] || continue
    [[ $line =~ ^[[:space:]]*([[:alnum:]_][[:alnum:]_.@-]*)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
      die "$HOSTFILE, line $number, $(printf '%q' "$line"): not a name and slots=NUMBER"
    require_processes "$HOSTFILE, line $number, slots" "${BASH_REMATCH[2]}"
    case " ${hosts[*]-} " in *" ${BASH_REMATCH[1]} "*) die "$HOSTFILE, line $number: ${BASH_REMATCH[1]} again" ;; esac
    hosts+=("${BASH_REMATCH[1]}")
    slots+=("${BASH_REMATCH[2]}")
  done <"$HOSTFILE"
  [ ${#hosts[@]} -gt 0 ] || die "$HOSTFILE names no host"
}

# exported: NAME=VALUE of what the hosts need of this environment, as DeepSpeed chooses it, but nothing secret
exported() {
  local name file=${DS_ENV_FILE:-.deepspeed_env}
  while IFS= read -r name; do
    case $name in
      PYTHON | *_TOKEN | *_KEY | *SECRET* | *PASSWORD*) ;;
      NCCL_* | GLOO_* | UCX_* | TORCH_* | PYTORCH_* | PYTHON* | HF_* | TRANSFORMERS_* | TOKENIZERS_* | TRITON_* | \
        TORCHINDUCTOR_* | DEEPSPEED_TIMEOUT | CC | CXX | CUDA_HOME | CUDA_LAUNCH_BLOCKING | DS_ACCELERATOR | \
        LD_LIBRARY_PATH | OMP_NUM_THREADS | PATH | XDG_CACHE_HOME)
        printf '%s=%s\n' "$name" "${!name}" ;;
    esac
  done < <(compgen -e)
  case $file in
    /*) cat "$file" ;;
    *) cat "$HOME/$file" "./$file" ;;
  esac 2>/dev/null | grep '=' || true
}

# node_line RANK: what runs on a host
node_line() {
  local rank=$1 words=() environment
  mapfile -t environment < <(exported)
  case $LAUNCHER in
    deepspeed) words=(deepspeed.launcher.launch "--world_info=$world" "--node_rank=$rank"
      "--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT") ;;
    torchrun) words=(torch.distributed.run --nnodes "${#hosts[@]}" --nproc_per_node "${slots[0]}" --node_rank "$rank"
      --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT") ;;
  esac
  printf 'cd %s && exec %s\n' "$(quoted "$PWD")" "$(quoted env "${environment[@]}" \
    "$PYTHON" "$here/supervise.py" --lifeline --reach "$MASTER_ADDR" --run "$run" --grace "$GRACE" \
    --finished "$OUTPUT/finished.json" --host "$rank" \
    "$PYTHON" -u -m "${words[@]}" "$here/main.py" "${FLAGS[@]}")"
}

# world_info: what DeepSpeed's launcher wants to know of all hosts
world_info() {
  local i text=
  for i in "${!hosts[@]}"; do
    text+=", \"${hosts[i]}\": [$(seq -s ', ' 0 $((slots[i] - 1)))]"
  done
  printf '{%s}' "${text#, }" | base64 -w0 | tr '+/' '-_'
}

# by_pdsh, by_ssh: start all hosts; lines come out as "host: line", and a host that fails as "…: host: ssh exited with …".
# A terminal's Ctrl-C must not reach what carries the run (setsid): the hosts are asked first.
by_pdsh() {
  local text
  text=$(quoted bash -c "$(node_line RANK-OF-THIS-HOST)") # whatever shell the user has there
  text=${text//%/%%} # %n is pdsh's own number of a host
  PDSH_SSH_ARGS_APPEND="${ssh[*]:1}" exec setsid "$PYTHON" "$here/supervise.py" --lifeline \
    pdsh -S -R ssh -f 1024 -w "$(IFS=,; printf '%s' "${hosts[*]}")" "${text//RANK-OF-THIS-HOST/%n}"
}

by_ssh() {
  local i input
  exec {input}<&0 # what runs in the background would get /dev/null
  for i in "${!hosts[@]}"; do
    setsid "${ssh[@]}" "${hosts[i]}" "$(quoted bash -c "$(node_line "$i")")" <&"$input" > >(sed -u "s/^/${hosts[i]}: /") 2>&1 ||
      printf 'multi_node.sh: %s: ssh exited with exit code %s\n' "${hosts[i]}" "$?" &
  done
  wait
}

# watch: print and log what the hosts say until all have ended; once one has failed, end the others. Sets culprit, code
watch() {
  local line='' part deadline=
  while :; do
    if IFS= read -r -t 1 part <&"$said"; then
      line+=$part
      printf '%s\n' "$line"
      printf '%s\n' "$line" >>"$OUTPUT/training.log"
      if [ "$code" = 0 ] && [[ $line =~ ^(pdsh@[^ ]*|multi_node.sh):\ ([^ ]+):\ ssh\ exited\ with\ exit\ code\ ([0-9]+)$ ]]; then
        culprit=${BASH_REMATCH[2]} code=${BASH_REMATCH[3]} deadline=$((SECONDS + soon))
        [ "$code" != 75 ] || deadline=$((SECONDS + 30)) # all of them have saved and are about to end
      fi
      line=
    elif [ $? -gt 128 ]; then # a second without a whole line
      line+=$part
    else
      break
    fi
    [ -z "$deadline" ] || [ "$SECONDS" -lt "$deadline" ] || end_all
    require_asked
  done
}

# stop NUMBER: at the first signal every host is asked to let its processes save; at the second, or where no host can be
# asked, all are ended. What the hosts do then, and how long they may take, is supervise.py's.
# shellcheck disable=SC2317 # called by traps
stop() {
  if [ -n "$asked" ]; then
    code=$((128 + $1))
    end_all
    return
  fi
  asked=$1
  local host
  for host in "${hosts[@]}"; do
    setsid "${ssh[@]}" "$host" "$(quoted "$PYTHON" "$here/supervise.py" --ask "$run")" </dev/null >/dev/null 2>&1 &
    asking+=($!)
  done
  printf 'asked all hosts to save a checkpoint and to end; a second signal ends them at once\n' >&2
}

# require_asked: once the requests have come back, whether any host has got one; else all are ended
require_asked() {
  local process got=
  [ -n "$asked" ] && [ ${#asking[@]} -gt 0 ] || return 0
  for process in "${asking[@]}"; do
    ! kill -0 "$process" 2>/dev/null || return 0 # has not come back
  done
  for process in "${asking[@]}"; do
    ! wait "$process" || got=1
  done
  asking=()
  [ -n "$got" ] || { code=$((128 + asked)) && end_all; }
}

# end_all: closing the lifeline ends what supervise.py started, here and on every host
end_all() {
  [ -z "$lifeline" ] || exec {lifeline}>&-
  lifeline=
}

# left_over HOST: wait until no process of this run is there; print their ids if that does not happen
left_over() {
  "${ssh[@]}" "$1" "bash -c 'for i in {1..40}; do pgrep -f \"[-]-run $run\" >/dev/null || exit 0; sleep 0.5; done; \
    pgrep -f \"[-]-run $run\" | tr \"\\n\" \" \"'" 2>/dev/null || true
}

hosts=() slots=()
read_hostfile
total=0
for count in "${slots[@]}"; do
  total=$((total + count))
done
LAUNCHER=${LAUNCHER:-$(command -v pdsh >/dev/null && printf deepspeed || printf torchrun)}
case $LAUNCHER in
  deepspeed) command -v pdsh >/dev/null || die "LAUNCHER=deepspeed needs pdsh: install it, or take LAUNCHER=torchrun" ;;
  torchrun) [ $((slots[0] * ${#slots[@]})) = "$total" ] ||
    die "torchrun starts as many processes on every host, and $HOSTFILE has different slots" ;;
  *) die "LAUNCHER=$LAUNCHER: deepspeed or torchrun" ;;
esac
find_python
settings "$total" "$@"
world=$(world_info)

if is_dry; then
  MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}} # its address is asked for when it is needed
  for i in "${!hosts[@]}"; do
    printf '# on %s:\n%s\n' "${hosts[i]}" "$(node_line "$i")"
  done
  check_flags
  exit
fi

check_flags
is_count "$MASTER_PORT" || die "MASTER_PORT=$MASTER_PORT is not a port"
pairs=()
for i in "${!hosts[@]}"; do
  pairs+=("${hosts[i]}:${slots[i]}")
done
read -ra allowed <<<"${PREFLIGHT_ALLOW:-}"
MASTER_ADDR=$(SSH=$(quoted "${ssh[@]}") "$PYTHON" "$here/preflight.py" ${allowed[0]:+--allow "${allowed[@]}"} \
  --address "${MASTER_ADDR:-}" "$(IFS=,; printf '%s' "${pairs[*]}")" "$MASTER_PORT" "${FLAGS[@]}") || exit 1

mkdir -p "$OUTPUT"
quoted "$0" "$@" >>"$OUTPUT/training.log"
fifo=$(mktemp -u)
mkfifo -m 600 "$fifo"
exec {lifeline}<>"$fifo" # held by this process alone: if it is killed, the hosts notice
exec {input}<"$fifo"
rm "$fifo"
culprit='' code=0 asked='' asking=()
trap 'stop 15' TERM
trap 'stop 2' INT
trap 'stop 10' USR1
exec {said}< <(
  exec <&"$input" {input}<&- {lifeline}>&- 2>&1
  case $LAUNCHER in deepspeed) by_pdsh ;; torchrun) by_ssh ;; esac
)
transport=$!
exec {input}>&-
watch
wait "$transport" || status=$?
[ "$code" != 0 ] || code=${status:-0}
if [ "$code" = 75 ]; then
  printf 'stopped: a checkpoint is saved, and the same command goes on from there\n' |
    tee -a "$OUTPUT/training.log" >&2
  culprit=
fi
# nothing had begun that could save, and the hosts did as they were told, by SIGTERM
if [ -n "$asked" ] && { [ "$code" = 143 ] || [ "$code" = $((128 + asked)) ]; }; then
  culprit='' code=$((128 + asked))
fi
if [ -n "$culprit" ]; then
  what="failed with exit status $code"
  [ "$code" != 255 ] || what="cannot be reached any more"
  printf 'error: %s %s; the other hosts were ended\n' "$culprit" "$what" | tee -a "$OUTPUT/training.log" >&2
fi
if [ "$code" != 0 ]; then
  [ -n "$culprit" ] || [ "$code" = 75 ] || printf 'stopped: the processes on all hosts are ended\n' | tee -a "$OUTPUT/training.log" >&2
  for host in "${hosts[@]}"; do
    [ "$host" != "$culprit" ] || [ "$code" != 255 ] || continue
    {
      left=$(left_over "$host")
      [ -z "$left" ] || printf 'error: %s still runs processes of this run: %s\n' "$host" "$left" >&2
    } &
  done
  wait
fi
exit "$code"
