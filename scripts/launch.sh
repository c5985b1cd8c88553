# Sourced by the launchers. One process: plain python, so that exit codes are the program's own. Several: the flags are
# checked in one process first, then torchrun starts them; from there on torchrun's exit code (1) and report apply.
# exec, so that signals reach the program and its exit code comes back.
#
#   launch PROGRAM PARSER FLAG…     PARSER: the module whose parse_args() the program calls
#
# Read from the environment:
#   NPROC_PER_NODE     processes on this machine (default: number of NVIDIA GPUs, else 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several machines: run the launcher on each (default: one machine)
#   PLAINVL_VENV       environment to use (default: the active one, then .venv)
#   PLAINVL_PRINT=1    print the command instead of running it

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

count_gpus() {
    local devices=()
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        [[ $CUDA_VISIBLE_DEVICES == -1 ]] || IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
        echo "${#devices[@]}"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

count_cores() {
    nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
}

launch() {
    local program=$1 parser=$2 processes=${NPROC_PER_NODE:-} nodes=${NNODES:-1} cores command
    shift 2
    processes=${processes:-$(count_gpus)}
    [[ $processes != 0 || -n ${NPROC_PER_NODE:-} ]] || processes=1
    [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE must be a number of processes, got '$processes'"
    [[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES must be a number of machines, got '$nodes'"
    find_python
    [[ $PWD == "$ROOT" ]] || program=$ROOT/$program
    if ((processes == 1 && nodes == 1)); then
        command=("$PYTHON" "$program")
    else
        command=("$PYTHON" -m torch.distributed.run --nproc_per_node="$processes")
        if ((nodes > 1)); then
            [[ -n ${MASTER_ADDR:-} && -n ${NODE_RANK:-} ]] ||
                fail "NNODES=$nodes also needs MASTER_ADDR (the first machine) and NODE_RANK (0 to $((nodes - 1)))"
            command+=(--nnodes="$nodes" --node_rank="$NODE_RANK")
            command+=(--master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}")
        elif [[ -n ${MASTER_PORT:-} ]]; then
            command+=(--master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$MASTER_PORT")
        else
            command+=(--standalone) # a free port
        fi
        command+=("$program")
    fi
    if [[ -n ${PLAINVL_PRINT:-} ]]; then
        printf '%q ' "${command[@]}" "$@"
        echo
        return
    fi
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
        fail "$PYTHON has no torch: activate your environment, or let scripts/quickstart.sh make .venv"
    if ((processes > 1 || nodes > 1)); then
        PYTHONPATH=$ROOT "$PYTHON" -c "from $parser import parse_args; parse_args()" "$@"
        cores=$(count_cores)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
    fi
    exec "${command[@]}" "$@"
}
