# Sourced by the launchers. One process: plain python, so that exit codes are the program's own. Several: the flags are
# checked in one process first, then torchrun starts them; from there on torchrun's exit code (1) and report apply.
# exec, so that signals reach the program and its exit code comes back.
#
#   launch PROGRAM PARSER FLAG…     PARSER: the module whose parse_args() the program calls, or module:function
#   launch_found PROGRAM ARGUMENT…  the same for any program: it and file arguments are looked up as given, then in
#                                   scripts/, then (the program only) at the root
#
# Read from the environment:
#   NPROC_PER_NODE     processes on this machine (default: number of NVIDIA GPUs, else 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     several machines: run the launcher on each (default: one machine)
#   OMP_NUM_THREADS    threads of each process (default: its share of the cores)
#   PLAINVL_VENV       environment to use (default: the active one, then .venv)
#   PLAINVL_PRINT=1    print the command instead of running it
#   PET_SIGNALS_TO_HANDLE           signals that torchrun passes on to the program (default: its own and SIGUSR1; under
#                                   nohup without SIGHUP, which would else end the run with the terminal)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds in which the program may then save before it is killed (300; older torch: 30)

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

# need_rank NAME VALUE NODES: a number from 0 to NODES - 1, or the end
need_rank() {
    [[ $2 =~ ^(0|[1-9][0-9]*)$ && $2 -lt $3 ]] || fail "$1 must be a number from 0 to $(($3 - 1)), got '$2'"
}

# The module whose parse_args() a program calls, or module:function, as far as it can be called before the program starts.
parser_of() {
    case ${1##*/} in
        run_beit3_finetuning.py) echo scripts.beit3_args ;;
        run_vle_vqa.py) echo scripts.vle_args ;;
        run_llava_lora.py) echo scripts.llava_args ;;
        main.py) echo scripts.baseline_args ;;
        model_vqa_loader.py) echo scripts.model_vqa_loader ;;
        train_end2end.py) echo scripts.vlbert_args:training_args ;;
        test.py) echo scripts.vlbert_args:prediction_args ;;
    esac
}

# check_flags PARSER FLAG…: one line and exit code 2 for mistakes, before any process is started
check_flags() {
    local module=${1%%:*} function=parse_args
    [[ $1 != *:* ]] || function=${1#*:}
    shift
    [[ -z $module ]] || PYTHONPATH=$ROOT "$PYTHON" -c "from $module import $function; $function()" "$@"
}

need_torch() {
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' ||
        fail "$PYTHON has no torch: activate your environment, or let scripts/quickstart.sh make .venv"
}

# find_program PROGRAM: its path, as given, in scripts/ or at the root
find_program() {
    local place here=
    [[ $PWD == "$ROOT" ]] || here=$ROOT/
    for place in "$1" "${here}scripts/$1" "$here$1"; do
        if [[ -f $place ]]; then
            echo "$place"
            return
        fi
    done
    fail "no program $1: looked for it as given, in $ROOT/scripts and in $ROOT"
}

# find_arguments ARGUMENT…: ARGUMENTS becomes them, with the path in scripts/ for a file that is there and not as given
find_arguments() {
    local argument
    ARGUMENTS=()
    for argument in "$@"; do
        if [[ $argument == *.* && $argument != [-/]* && ! -e $argument && -f $ROOT/scripts/$argument ]]; then
            argument=$ROOT/scripts/$argument
            [[ $PWD != "$ROOT" ]] || argument=${argument#"$ROOT/"}
        fi
        ARGUMENTS+=("$argument")
    done
}

launch() {
    local program=$1 parser=$2
    shift 2
    [[ $PWD == "$ROOT" ]] || program=$ROOT/$program
    start_processes "$program" "$parser" "$@"
}

launch_found() {
    local program
    program=$(find_program "$1")
    shift
    find_arguments "$@"
    start_processes "$program" "$(parser_of "$program")" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
}

# start_processes PROGRAM PARSER FLAG…
start_processes() {
    local program=$1 parser=$2 processes=${NPROC_PER_NODE:-} nodes=${NNODES:-1} port=${MASTER_PORT:-} cores command
    shift 2
    processes=${processes:-$(count_gpus)}
    [[ $processes != 0 || -n ${NPROC_PER_NODE:-} ]] || processes=1
    need_number NPROC_PER_NODE "a number of processes" "$processes"
    need_number NNODES "a number of machines" "$nodes"
    [[ -z $port || ($port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535) ]] ||
        fail "MASTER_PORT must be a port from 1 to 65535, got '$port'"
    find_python
    if ((processes == 1 && nodes == 1)); then
        command=("$PYTHON" "$program")
    else
        command=("$PYTHON" -m torch.distributed.run --nproc_per_node="$processes")
        if ((nodes > 1)); then
            [[ -n ${MASTER_ADDR:-} && -n ${NODE_RANK:-} ]] ||
                fail "NNODES=$nodes also needs MASTER_ADDR (the first machine) and NODE_RANK (0 to $((nodes - 1)))"
            need_rank NODE_RANK "$NODE_RANK" "$nodes"
            command+=(--nnodes="$nodes" --node_rank="$NODE_RANK")
            command+=(--master_addr="$MASTER_ADDR" --master_port="${port:-29500}")
        elif [[ -n $port ]]; then
            command+=(--master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port")
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
    need_torch
    if ((processes > 1 || nodes > 1)); then
        check_flags "$parser" "$@"
        cores=$(count_cores)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
        pass_signals_on
    fi
    exec "${command[@]}" "$@"
}

# Tell torchrun which signals its workers get and how long they may take to save; it asks the environment.
pass_signals_on() {
    local signals=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
    [[ $(trap -p SIGHUP) == "trap -- ''"* ]] || signals+=,SIGHUP # ignored under nohup: let it stay so
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-$signals}
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
}
