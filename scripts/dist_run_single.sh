#!/usr/bin/env bash
# Run one of the programs with several processes on this machine.
#
#   ./scripts/dist_run_single.sh <num_gpus> <program.py> [argument...]
#
#   bash scripts/dist_run_single.sh 8 run_beit3_finetuning.py --task vqav2
#
# The program is looked up as given, then in scripts/, then at the root; files among the arguments as given, then in
# scripts/. Variables and the Python to use: see scripts/launch.sh; several machines: scripts/dist_run_multi.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

(($# >= 2)) || fail "usage: $0 <num_gpus> <program.py> [argument...]"
need_number num_gpus "a number of processes" "$1"
NNODES=1 NPROC_PER_NODE=$1
shift

launch_found "$@"
