#!/usr/bin/env bash
# Sets vitq up if it is not, then runs `vitq demo` in the current folder; arguments go to it: bash examples/demo.sh --run-dir my-run
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" ""
exec "$VIRTUAL_ENV/bin/vitq" demo "$@"
