#!/usr/bin/env bash
# Prints the path of a Python that has the packages of a requirements.txt.
#
#   python=$(bash venv.sh requirements.txt [OPTION OF python -m venv]…)
#
# The first job on a machine makes a virtual environment below $USER_DIR, which all your jobs
# on that machine share; later ones find it there. Other requirements, or another Python, get
# an environment of their own. Where several processes of a job share a machine, one installs
# and the others wait for it.
#
#   --env PYTHON=/opt/python/bin/python3   builds on another Python than python3
#   --env PIP_INDEX_URL=…                  and all else that pip reads, as everywhere
#   --env PIP_NO_INDEX=1                   takes nothing but wheels that the machine's owner
#                                          has put into $SHARED_DIR/wheels
set -euo pipefail

say() { echo "$*" >&2; }
fail() {
  say "error: $*"
  exit 1
}

requirements=$1
shift
python=${PYTHON:-python3}
machine=$(uname -n)

command -v "$python" >/dev/null ||
  fail "jobs on $machine find no $python: install it where they see it, which homes are not," \
    "or name another with --env PYTHON=/path/to/it"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python on $machine cannot make virtual environments: install them there" \
    "(Debian, Ubuntu: apt install python3-venv), or name another with --env PYTHON=/path/to/it"

about=$("$python" -c 'import sys; print(sys.executable, sys.version)')
name=$({ echo "$about" "$@" && cat "$requirements"; } | sha256sum | cut -c 1-16)
venv=$USER_DIR/venvs/$name
mkdir -p "$USER_DIR/venvs"

exec 9>"$venv.lock"
if ! flock --nonblock 9; then
  say "another process is installing the packages: waiting for it"
  flock 9
fi

# Written last: without it, an installation was cut short.
if [ ! -e "$venv/complete" ]; then
  say "installing the packages of $requirements on $machine: once, for all your jobs there"
  rm -rf "$venv"
  "$python" -m venv "$@" "$venv" >&2
  export PIP_CACHE_DIR=${PIP_CACHE_DIR:-$USER_DIR/cache/pip}
  if [ -d "$SHARED_DIR/wheels" ]; then
    export PIP_FIND_LINKS="${PIP_FIND_LINKS:-} $SHARED_DIR/wheels"
  fi
  # What is imported is compiled then; most never is.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile \
    --requirement "$requirements" >&2 ||
    fail "pip cannot install the packages of $requirements on $machine: it says why above"
  touch "$venv/complete"
  say "installed in $SECONDS s"
fi
echo "$venv/bin/python"
