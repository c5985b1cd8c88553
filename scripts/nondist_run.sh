#!/usr/bin/env bash
# Run one of the programs with one process.
#
#   ./scripts/nondist_run.sh <program.py> [argument...]
#
#   bash scripts/nondist_run.sh vqa/train_end2end.py cfgs/vqa/base_4X16G_fp32.yaml output
#
# The program and files among the arguments are looked up as in scripts/dist_run_single.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

(($# >= 1)) || fail "usage: $0 <program.py> [argument...]"
NNODES=1 NPROC_PER_NODE=1

launch_found "$@"
