#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Put the patches into a checkout of DeepSpeedExamples, or take them out again.
#
#   patches/apply.sh check  TARGET      would they go in? writes nothing
#   patches/apply.sh apply  TARGET      put them in
#   patches/apply.sh revert TARGET      give back the bytes that were there
#
# TARGET: a clone or an unpacked archive of DeepSpeedExamples, or its applications/DeepSpeed-Chat. All of it happens in
# a copy first; TARGET changes at the end, whole or not at all. Exit status: 0 done, 1 refused, 2 wrong usage.
set -euo pipefail
export LC_ALL=C
unset CDPATH # with it, cd goes elsewhere and prints where

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
chat=applications/DeepSpeed-Chat
refuse() {
  printf 'apply.sh: %s\n' "$*" >&2
  exit 1
}

# --- the tree, and the patches for it --------------------------------------------------------------------------------

find_tree() { # sets tree
  [ -d "$1" ] || refuse "$1: no such folder"
  tree=$(cd "$1" && pwd -P)
  case $tree in
    */"$chat") tree=${tree%/"$chat"} ;;
  esac
}

choose_series() { # sets layout, patches
  if [ -f "$tree/$chat/dschat/utils/model/model_utils.py" ]; then
    layout=package
    patches=("$here"/[0-9]*.patch)
  elif [ -f "$tree/$chat/training/utils/model/model_utils.py" ]; then
    layout=legacy
    patches=("$here"/legacy/[0-9]*.patch)
  else
    refuse "$tree is not a checkout of DeepSpeedExamples: it has no $chat/dschat/utils/model/model_utils.py"
  fi
}

refuse_inside_another_repository() { # there, git apply succeeds and changes nothing
  local folder=$tree
  if [ -e "$tree/.git" ]; then return; fi
  while [ "$folder" != / ]; do
    folder=$(dirname "$folder")
    if [ -e "$folder/.git" ]; then
      refuse "$tree lies in another git repository, $folder: give a clone of DeepSpeedExamples, or unpack it elsewhere"
    fi
  done
}

take_the_lock() { # until this process ends; a file system that has no locks does without
  command -v flock >/dev/null || return 0
  exec 9<"$tree/$chat"
  flock --nonblock --conflict-exit-code 75 9 2>/dev/null || [ $? -ne 75 ] || refuse "apply.sh is at work in $tree already"
}

list_files() { # sets touched: upstream's files that patches change; created: files that they add
  mapfile -t touched < <(awk -v layout="$layout" '$1 == layout { print $5 }' "$here/UPSTREAM" | sort -u)
  mapfile -t created < <(
    awk '/^diff --git / { path = substr($4, 3) } /^new file mode / || /^rename to / { print path }' "${patches[@]}" |
      sort -u | grep -vxF -f <(printf '%s\n' "${touched[@]}")
  )
}

refuse_without_permission() {
  local path
  for path in "${touched[@]}"; do
    if [ -e "$tree/$path" ] && ! [ -w "$(dirname "$tree/$path")" ]; then
      refuse "no permission to write in $(dirname "$tree/$path")"
    fi
  done
}

copy_tree() { # FROM TO: those of the files that are there
  local path
  for path in "${touched[@]}" "${created[@]}"; do
    [ -e "$1/$path" ] || continue
    if [ -L "$1/$path" ]; then refuse "$path is a symbolic link: give a tree of plain files"; fi
    { mkdir -p "$2/$(dirname "$path")" && cp -p "$1/$path" "$2/$path"; } 2>/dev/null ||
      refuse "cannot copy $path to $2 (unreadable, or no space there)"
  done
}

is_upstreams() { # FOLDER PATH: one of the versions in UPSTREAM, byte for byte
  [ -f "$1/$2" ] && grep -q "^$layout $(outside_git "$1" hash-object --no-filters "$2") .* $2\$" "$here/UPSTREAM"
}

# --- git apply, in a copy that belongs to no repository --------------------------------------------------------------

outside_git() ( # FOLDER WORDS…: git there, as if there were no repository and no configuration
  cd "$1"
  shift
  unset "${!GIT_@}"
  export GIT_CEILING_DIRECTORIES="$stage" GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
  git "$@"
)

git_apply() { # FOLDER FLAGS… PATCH
  local folder=$1
  shift
  why=$(outside_git "$folder" apply --whitespace=nowarn "$@" 2>&1) && return
  case $why in
    *"unable to write"* | *"failed to write"* | *"unable to create"* | *"No space left"* | *"File too large"*)
      refuse "no space in ${TMPDIR:-/tmp}, where the patches are tried: ${why%%$'\n'*}"
      ;;
  esac
  return 1
}

has_its_lines() { # FOLDER PATCH: the text that an Only-Where patch mends is there
  local where
  where=$(sed -n 's/^Only-Where: //p' "$2")
  [ -z "$where" ] || { [ -f "$1/${where%%: *}" ] && grep -qF "${where#*: }" "$1/${where%%: *}"; }
}

put_in() { # FOLDER
  local patch
  used=0
  for patch in "${patches[@]}"; do
    if ! has_its_lines "$1" "$patch"; then continue; fi
    git_apply "$1" "$patch" || refuse "$(basename "$patch") does not fit: ${why%%$'\n'*}"
    used=$((used + 1))
  done
}

take_out() { # FOLDER [FLAGS…]
  local folder=$1 i
  shift
  for ((i = ${#patches[@]} - 1; i >= 0; i--)); do
    git_apply "$folder" -R "$@" "${patches[i]}" && continue
    grep -q '^Only-Where: ' "${patches[i]}" || return 1 # else it was not needed here
  done
}

# --- what state the tree is in ---------------------------------------------------------------------------------------

read_state() { # sets state: original, applied, changed or half, and odd: the files that say so
  local path there=0
  odd=()
  for path in "${created[@]}"; do
    if [ -e "$stage/before/$path" ]; then there=$((there + 1)); fi
  done
  for path in "${touched[@]}"; do
    if [ -e "$stage/before/$path" ] && ! is_upstreams "$stage/before" "$path"; then odd+=("$path"); fi
  done
  if [ "$there" -eq 0 ]; then
    state=original
    if [ ${#odd[@]} -gt 0 ]; then state=changed; fi
    return
  fi
  if [ ${#odd[@]} -eq 0 ]; then # after git checkout, say, which leaves new files alone
    state=original
    find_what_is_in_the_way
    return
  fi
  copy_tree "$tree" "$stage/reverted"
  if take_out "$stage/reverted" && puts_back; then
    state=applied
    odd=()
    for path in "${touched[@]}"; do
      if [ -e "$stage/reverted/$path" ] && ! is_upstreams "$stage/reverted" "$path"; then odd+=("$path"); fi
    done
    return
  fi
  state=half
  find_what_is_half
}

find_what_is_in_the_way() { # ours, byte for byte, are not
  local path mine=()
  copy_tree "$stage/before" "$stage/again"
  for path in "${created[@]}"; do rm -f "$stage/again/$path"; done
  put_in "$stage/again"
  for path in "${created[@]}"; do
    if [ -e "$stage/before/$path" ] && ! cmp -s "$stage/before/$path" "$stage/again/$path"; then mine+=("$path"); fi
  done
  if [ ${#mine[@]} -gt 0 ]; then refuse "the patches add files that are there already: move away ${mine[*]}"; fi
}

puts_back() { # the patches that reverted lacks give the tree's files again; else one of them was not in
  local path
  copy_tree "$stage/reverted" "$stage/again"
  put_in "$stage/again"
  for path in "${touched[@]}" "${created[@]}"; do
    if [ -e "$stage/before/$path" ] && ! cmp -s "$stage/before/$path" "$stage/again/$path"; then return 1; fi
  done
}

find_what_is_half() { # narrows odd to the first file that is neither upstream's nor wholly patched
  local path both
  for path in "${touched[@]}" "${created[@]}"; do
    [ -e "$stage/before/$path" ] || { odd=("$path") && return; }
    if is_upstreams "$stage/before" "$path"; then
      odd=("$path")
      return
    fi
    rm -rf "$stage/one"
    copy_tree "$tree" "$stage/one"
    both=(--include="$path")
    case $path in # the rename holds the two together
      */reward_model.py) both+=(--include="${path%.py}_upstream.py") ;;
      */reward_model_upstream.py) both+=(--include="${path%_upstream.py}.py") ;;
    esac
    if ! take_out "$stage/one" "${both[@]}"; then
      odd=("$path")
      return
    fi
  done
}

# --- writing the tree ------------------------------------------------------------------------------------------------

mark=.reward-model-patch
write_back() { # FOLDER: make the tree's files those of FOLDER, all or none
  local path folder
  written=() moved=()
  trap 'undo; exit 130' INT TERM HUP
  for path in "${touched[@]}" "${created[@]}"; do
    if ! [ -e "$1/$path" ] || cmp -s "$1/$path" "$tree/$path"; then continue; fi
    folder=$tree/$(dirname "$path")
    written+=("$path")
    {
      if [ -e "$tree/$path" ]; then cp -p "$tree/$path" "$(aside new "$path")"; fi && # keeps mode and owner
        cat "$1/$path" >"$(aside new "$path")" && cmp -s "$1/$path" "$(aside new "$path")"
    } 2>/dev/null || give_up "cannot write in $folder (no permission, or no space)"
  done
  for path in "${touched[@]}" "${created[@]}"; do
    if ! [ -e "$tree/$path" ] || cmp -s "$1/$path" "$tree/$path"; then continue; fi
    moved+=("$path")
    rm -f "$(aside old "$path")" # of a run that was killed
    # a second name takes no space, and putting it back neither
    { ln "$tree/$path" "$(aside old "$path")" || cp -p "$tree/$path" "$(aside old "$path")"; } 2>/dev/null ||
      give_up "cannot write in $tree/$(dirname "$path") (no permission, or no space)"
    if ! [ -e "$1/$path" ]; then rm -f "$tree/$path" || give_up "cannot remove $path"; fi
  done
  for path in ${written[@]+"${written[@]}"}; do
    mv -f "$(aside new "$path")" "$tree/$path" 2>/dev/null || give_up "cannot replace $path"
  done
  trap - INT TERM HUP
  for path in ${moved[@]+"${moved[@]}"}; do rm -f "$(aside old "$path")"; done
}

aside() { # new|old PATH: a name beside the file, on its file system
  printf '%s/%s/%s.%s.%s' "$tree" "$(dirname "$2")" "$mark" "$1" "$(basename "$2")"
}

give_up() {
  undo
  refuse "$1: nothing was changed"
}

undo() {
  local path
  for path in ${written[@]+"${written[@]}"}; do
    rm -f "$(aside new "$path")"
    if ! [ -e "$stage/before/$path" ]; then rm -f "$tree/$path"; fi
  done
  for path in ${moved[@]+"${moved[@]}"}; do
    if ! [ -e "$tree/$path" ] || ! cmp -s "$stage/before/$path" "$tree/$path"; then
      mv -f "$(aside old "$path")" "$tree/$path"
    else
      rm -f "$(aside old "$path")" # mv refuses two names of one file
    fi
  done
}

# --- the three commands ----------------------------------------------------------------------------------------------

refuse_unless_original() {
  case $state in
    changed)
      refuse "${odd[0]} is not upstream's of $(listed_days): changed by you, or of another commit." \
        "Yours: git stash, apply, git add -A, git stash pop. Another commit: check out one of those days'"
      ;;
    applied) refuse "applied already to $tree: revert first" ;;
    half) refuse_half ;;
  esac
}

listed_days() {
  if [ "$layout" = package ]; then printf '6 November 2023 to 29 March 2026'; else printf '24 to 28 April 2023'; fi
}

refuse_half() {
  refuse "half applied: ${odd[0]} is not as the patches leave it (changed since, or some of them are missing)." \
    "Keep a copy of your changes and put upstream's files back (git checkout -- $chat, or unpack again)"
}

usage() {
  sed -n '3,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

main() {
  local path
  case ${1:-} in
    check | apply | revert) ;;
    -h | --help) usage && exit ;;
    *) printf 'apply.sh: %s: unknown command\n' "${1:-none}" >&2 && usage >&2 && exit 2 ;;
  esac
  [ $# -eq 2 ] || { usage >&2 && exit 2; }
  command -v git >/dev/null || refuse "git is not installed; it applies the patches"
  find_tree "$2"
  choose_series
  refuse_inside_another_repository
  list_files
  take_the_lock
  stage=$(mktemp -d 2>/dev/null) || refuse "no temporary folder: no space in ${TMPDIR:-/tmp}?"
  stage=$(cd "$stage" && pwd -P)
  trap 'rm -rf "$stage"' EXIT
  mkdir "$stage/before" "$stage/after" "$stage/reverted" 2>/dev/null || refuse "no space in ${TMPDIR:-/tmp}"
  copy_tree "$tree" "$stage/before"
  refuse_without_permission
  read_state

  if [ "$1" = revert ]; then
    case $state in
      half) refuse_half ;;
      changed) refuse "not applied to $tree: nothing to revert" ;;
      original)
        copy_tree "$tree" "$stage/reverted"
        for path in "${created[@]}"; do rm -f "$stage/reverted/$path"; done
        [ -n "$(diff -rq "$stage/before" "$stage/reverted")" ] || refuse "not applied to $tree: nothing to revert"
        ;;
    esac
    write_back "$stage/reverted"
    printf 'reverted: %s\n' "$tree"
    if [ ${#odd[@]} -gt 0 ]; then printf 'your own changes stay in %s\n' "${odd[@]}"; fi
    return
  fi
  refuse_unless_original
  copy_tree "$tree" "$stage/after"
  for path in "${created[@]}"; do rm -f "$stage/after/$path"; done
  put_in "$stage/after"
  if [ "$1" = check ]; then
    printf '%s of %s patches go in (%s layout)' "$used" "${#patches[@]}" "$layout"
    if [ "$used" -lt ${#patches[@]} ]; then printf '; the others mend lines of other versions'; fi
    printf '\n'
    return
  fi
  write_back "$stage/after"
  printf 'applied: %s of %s patches (%s layout) to %s\n' "$used" "${#patches[@]}" "$layout" "$tree"
  if [ "$layout" = package ]; then printf 'once:   pip install -e %q\n' "$tree/$chat"; fi
  printf 'step 2: cd %q && deepspeed main.py --help\n' "$tree/$chat/training/step2_reward_model_finetuning"
}

main "$@"
