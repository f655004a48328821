#!/usr/bin/env bash
# Clear what training and show.py have written.
set -euo pipefail

usage="usage: clean.sh [--all] [--yes]
Removes everything in logdir and showdir, and with --all in models too: every checkpoint of every run.
Kept are README.md, .gitkeep and all files that git tracks, such as shipped weights; where this is no git checkout,
also the files models/*.pth. Symbolic links are removed, never followed.
  --all   the checkpoints too; asks first
  --yes   do not ask"

fail() {
  echo "error: $1" >&2
  exit 1
}

folders="logdir showdir" all=no sure=no
for word in "$@"; do
  case "$word" in
    -h | --help) echo "$usage"; exit 0 ;;
    --all) all=yes folders="$folders models" ;;
    --yes) sure=yes ;;
    *) fail "unknown argument '$word'; clean.sh --help tells which there are" ;;
  esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.." > /dev/null
for folder in $folders; do
  [[ ! -L "$folder" ]] || fail "$PWD/$folder is a symbolic link, and what it points to is not touched: clear it by hand"
done
if [[ $all == yes && $sure == no ]]; then
  [[ -t 0 ]] || fail "--all removes the checkpoints in $PWD/models: confirm it with --yes"
  read -r -p "Remove logdir, showdir and all checkpoints in $PWD/models? yes or no: " answer
  [[ "$answer" == yes ]] || fail "nothing was removed"
fi

# A copy that lies in someone else's checkout, or in a new one, has no list of its shipped weights.
git=no
if git ls-files --error-unmatch config/clean.sh > /dev/null 2>&1; then git=yes; fi

kept() { # whether a file, or any file in a folder, is to stay
  case "$1" in
    */*/*) ;;
    */README.md | */.gitkeep) return 0 ;;
    models/*.pth) [[ $git == yes ]] || return 0 ;;
  esac
  [[ $git == yes ]] || return 1
  local tracked
  tracked="$(git --literal-pathspecs ls-files -- "$1")" || fail "git can't tell whether it tracks $1: nothing more is removed"
  [[ -n "$tracked" ]]
}

remove() { # a file, a link, or a folder as far as nothing in it is kept
  local entry
  if ! kept "$1"; then
    rm -rf -- "$1"
    echo "removed $1"
  elif [[ -d "$1" && ! -L "$1" ]]; then
    for entry in "$1"/* "$1"/.[!.]* "$1"/..?*; do
      if [[ -e "$entry" || -L "$entry" ]]; then remove "$entry"; fi # a pattern without a match stands for itself
    done
  fi
}

for folder in $folders; do
  for entry in "$folder"/* "$folder"/.[!.]* "$folder"/..?*; do
    if [[ -e "$entry" || -L "$entry" ]]; then remove "$entry"; fi
  done
done
