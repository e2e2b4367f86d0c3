#!/usr/bin/env bash
# Sets vitq and its test tools up if they are not, then runs the tests in two processes; arguments go to pytest: bash tests/run.sh -k solver
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup.sh dev
exec "$VIRTUAL_ENV/bin/python" -m pytest -n 2 --dist worksteal "$@" # neighbours stay together: what a file makes once is made once
