# shellcheck shell=bash
# Sourced by the launchers, from the top of the repository. What can be set:
#   PYTHON=/path/to/python3.12   makes the environments: 3.11, 3.12 or 3.13; python3 if it is not set
#   VENV=/path/to/folder         where the environment is or will be; .venv if it is not set
VENV=${VENV:-.venv}

stop() {
  echo "error: $*" >&2
  exit 2
}

# environment FOLDER EXTRAS: a virtual environment that has the package with these extras as setup.cfg stands; made, or installed into, if need be.
environment() {
  local folder=$1 extras=$2 python=${PYTHON:-python3} version
  if ! "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || stop "$python does not run: set PYTHON=/path/to/python3.11, 3.12 or 3.13"
    case $version in
      3.11 | 3.12 | 3.13) ;;
      *) stop "$python is Python $version: oel_jax runs on 3.11, 3.12 and 3.13; set PYTHON=/path/to/one of them" ;;
    esac
    clear_environment "$folder"
    "$python" -m venv "$folder" || { clear_environment "$folder"; stop "could not make $folder (on Debian: apt-get install python3-venv)"; }
  fi
  refuse_another_checkout "$folder"
  if ! cmp -s setup.cfg "$folder/installed$extras"; then
    echo "installing oel_jax$extras into $folder (once, a few minutes)"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --editable ".$extras"
    cp setup.cfg "$folder/installed$extras"
  fi
}

# Stops where the environment has the package of another checkout, for what starts Python anew in another folder would run that one's code.
# One whose checkout is gone, moved with it perhaps, is installed into again.
refuse_another_checkout() {
  local record url checkout
  for record in "$1"/lib/python*/site-packages/oel_jax-*.dist-info/direct_url.json; do
    url=$(sed -n 's|.*"url": *"file://\([^"]*\)".*|\1|p' "$record" 2>/dev/null) || true
    printf -v checkout %b "${url//%/\\x}"
    if [ -z "$checkout" ] || [ "$checkout" -ef . ]; then continue; fi
    [ ! -d "$checkout" ] || stop "$1 has the oel_jax of $checkout, and this is $PWD: set VENV to a folder of this checkout's own, or remove $1 to have it made anew"
    rm -f "$1"/installed*
  done
}

# Removes a virtual environment, whole or half made, and nothing else. Moved away first: half removed it would be none, and in the way.
clear_environment() {
  rm -rf "$1.removed"
  [ -e "$1" ] || return 0
  [ -e "$1/pyvenv.cfg" ] || stop "$1 is there and is no virtual environment"
  mv "$1" "$1.removed"
  rm -rf "$1.removed"
}

# What follows is for the launchers of runs.

# read_arguments ARGUMENT…: sets `dry_run`, if --dry-run is among them, and `arguments`, the flags of oel_jax.main; stops without the two that every run has.
dry_run='' arguments=()
read_arguments() {
  local argument
  for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=yes; else arguments+=("$argument"); fi
  done
  for argument in config workdir; do
    [[ " ${arguments[*]-} " == *" --$argument"[=\ ]* ]] || stop "--$argument is not given: every run has --config=FILE and --workdir=FOLDER"
  done
}

# needs NAME…: stops where a variable that the launcher reads is not set.
needs() {
  local name
  for name in "$@"; do
    [ -n "${!name-}" ] || stop "$name is not set: the first lines of $0 say what it is"
  done
}

# act COMMAND…: runs it; in a dry run prints it, as the shell reads it, and does nothing.
act() {
  if [ -z "$dry_run" ]; then
    "$@"
  else
    local line
    printf -v line '%q ' "$@"
    echo "${line% }"
  fi
}

# files_here: names of the working tree's files, without those that git ignores, each ended by a zero byte.
files_here() {
  local file
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
    if [ -e "$file" ]; then printf '%s\0' "$file"; fi
  done
}
