#!/usr/bin/env bash
# Every benchmark beside its public peer, in one command; writes the tables of benchmarks/RESULTS.md.
#
#   bash benchmarks/run_all.sh                         # about half an hour on two cores; leave the machine alone meanwhile
#   bash benchmarks/run_all.sh --quick                 # a minute: does everything run; RESULTS.md stays as it is
#   bash benchmarks/run_all.sh --only vle_step data    # some of them (--list: their names and commands)
#   bash benchmarks/run_all.sh --devices cuda          # the GPU alone; without it the CPU, and the GPU if there is one
#   bash benchmarks/run_all.sh --output_dir results    # where cpu.json and cuda.json go (benchmarks/out)
#
# Uses $PLAINVL_VENV, the active environment or .venv. Peers come from requirements-dev.txt; one that is not installed is
# said so in the table. --threads N: of the CPU (all cores).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"
find_python
exec "$PYTHON" "$ROOT/benchmarks/run_all.py" "$@"
