#!/usr/bin/env bash
# Everything that CI checks: style, formatting, the tests, and in them the quick start at reduced size.
#
#   bash scripts/test.sh                        # about 25 minutes on two cores
#   bash scripts/test.sh --all                  # with the tests marked slow
#   bash scripts/test.sh tests/data -k vqav2    # other words go to pytest
#
# Makes the environment of scripts/quickstart.sh with the packages of requirements-dev.txt on top.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"

selection=(-m "not slow")
if [[ ${1:-} == --all ]]; then
    selection=()
    shift
fi
make_environment requirements.txt requirements-dev.txt
ruff check .
ruff format --check .
# a worker on each core, a file's tests on the same one since they share what they made
cores=$(count_cores)
exec python -m pytest -n "$((cores < 8 ? cores : 8))" --dist loadfile ${selection[@]+"${selection[@]}"} "$@" </dev/null
