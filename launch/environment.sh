# Sourced by the launchers, from the top of the repository: a .venv with the package and the extras named in $1, made once.
# PYTHON names the interpreter to make it with (3.11 or 3.12; python3 by default).
installed=".venv/installed$1"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1): oel_jax needs Python 3.11 or newer; set PYTHON=/path/to/it" >&2
    exit 2
  }
  rm -rf .venv
  "${PYTHON:-python3}" -m venv .venv || { rm -rf .venv; echo "error: could not make .venv (on Debian: apt-get install python3-venv)" >&2; exit 2; }
fi
if [ ! -e "$installed" ] || [ setup.cfg -nt "$installed" ]; then
  echo "installing oel_jax$1 into .venv (once, a few minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$1"
  touch "$installed"
fi
