#!/usr/bin/env bash
# Run one of the programs on several machines: give this command on each of them, with its own node rank.
#
#   ./scripts/dist_run_multi.sh <num_nodes> <node_rank> <master_addr> <gpus_per_node> <program.py> [argument...]
#
#   bash scripts/dist_run_multi.sh 2 0 10.0.0.1 8 run_beit3_finetuning.py --task vqav2 --output_dir /shared/vqav2
#   bash scripts/dist_run_multi.sh 2 1 10.0.0.1 8 run_beit3_finetuning.py --task vqav2 --output_dir /shared/vqav2
#
# master_addr is the machine of node rank 0, by a name or address that all of them reach, on port MASTER_PORT (29500).
# The program is looked up as given, then in scripts/, then at the root; files among the arguments as given, then in
# scripts/. What must be the same on all machines, network settings, stopping: docs/several_machines.md. Variables and
# the Python to use: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

(($# >= 5)) || fail "usage: $0 <num_nodes> <node_rank> <master_addr> <gpus_per_node> <program.py> [argument...]"
need_number num_nodes "a number of machines" "$1"
need_rank node_rank "$2" "$1"
[[ $3 =~ ^[[:alnum:]] && $3 != *.py ]] || fail "master_addr must be the name or address of the first machine, got '$3'"
need_number gpus_per_node "a number of processes" "$4"
NNODES=$1 NODE_RANK=$2 MASTER_ADDR=$3 NPROC_PER_NODE=$4
shift 4

launch_found "$@"
