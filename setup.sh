# Installs vitq from this checkout into the active virtual environment, or into .venv beside this file, and activates that.
#
#   source setup.sh          what vitq needs
#   source setup.sh dev      also what its tests need
#   source setup.sh docs     also what its documentation needs
#
# Installs only when pyproject.toml has changed since the last time. PYTHON=COMMAND chooses the Python of a new environment,
# VITQ_VENV=/A/FOLDER its place. Needs bash, Python 3.11 or later with venv, and a network the first time.

_vitq_find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11 or later with venv was found (tried: ${PYTHON:-python3, python3.11 to python3.14, python});" \
    "install one (Debian, Ubuntu: python3 python3-venv) or name it: PYTHON=/path/to/python" >&2
  return 1
}

_vitq_setup() {
  local extra="${1:-}" root environment stamp wanted python
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" || return
  if [ -z "${VIRTUAL_ENV:-}" ]; then
    environment="${VITQ_VENV:-$root/.venv}"
    # absent, moved from elsewhere (activate holds the path) or left half made
    if ! grep -qsF "$environment" "$environment/bin/activate" || ! "$environment/bin/python" -c 'import pip' 2>/dev/null; then
      python="$(_vitq_find_python)" || return
      echo "making a virtual environment in $environment" >&2
      "$python" -m venv --clear "$environment" || return
    fi
    # shellcheck disable=SC1091
    source "$environment/bin/activate" || return
  fi

  stamp="$VIRTUAL_ENV/vitq-installed${extra:+-$extra}"
  wanted="$root"$'\n'"$(cat "$root/pyproject.toml")"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing vitq and what it needs into $VIRTUAL_ENV (some minutes, several GB, the first time)" >&2
    "$VIRTUAL_ENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VIRTUAL_ENV/bin/python" -m ensurepip >&2 || return
    "$VIRTUAL_ENV/bin/python" -m pip install --quiet --no-input --editable "$root${extra:+[$extra]}" >&2 || return
    printf '%s\n' "$wanted" >"$stamp"
  fi
}

_vitq_setup "$@"
