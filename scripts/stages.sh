# Sourced by the scripts that make everything on drawn data (quickstart.sh, demo_llava.sh, compare_strategies.sh): what
# they need to do a long work in stages, so that a second run keeps what is done and an interrupted one goes on.
#
#   need_count NAME VALUE [LEAST] [WHY]  a whole number of at least LEAST (default 1), or one line and exit code 2
#   choose_processes BATCH_SIZE          processes, num_workers and OMP_NUM_THREADS for a tiny network on this machine
#   open_folder NAME FOLDER              folder becomes FOLDER, made if need be, with its full name; the script goes on at
#                                        the root
#   note_settings NAME WHAT SETTINGS     refuses the folder if it holds a WHAT with other settings, else notes them there
#   stage NAME PRODUCT FUNCTION          runs the function unless an earlier run finished it and PRODUCT is still there
#   show COMMAND…                        prints a command, then runs it
#   print_times                          how long each stage took
#
# NAME: the variable that a user sets, for the message. Check all values before note_settings: a wrong one that is noted
# would refuse the right ones of the next run.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

times=()

need_count() {
    local least=${3:-1}
    [[ $2 =~ ^(0|[1-9][0-9]*)$ && $2 -ge $least ]] ||
        fail "$1 must be a whole number of at least $least${4:+ ($4)}, got '$2'"
}

# One thread computes, and on two cores one process beside it reads pictures. Two computing threads were far slower where
# other programs also wanted the cores: in a network this small they mostly wait for each other.
choose_processes() {
    local cores
    cores=$(count_cores)
    processes=${NPROC_PER_NODE:-1}
    need_number NPROC_PER_NODE "a number of processes" "$processes"
    ((processes <= $1)) || fail "NPROC_PER_NODE must be at most $1, the batch size over all processes, got '$processes'"
    num_workers=$((cores > 2 ? 2 : cores - 1))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

open_folder() {
    mkdir -p "$2" || fail "cannot make $1=$2: choose another folder"
    folder=$(cd "$2" && pwd)
    cd "$ROOT"
}

note_settings() {
    local file=$folder/settings.txt
    if [[ ! -e $file ]]; then
        echo "$3" >"$file"
    elif [[ $(<"$file") != "$3" ]]; then
        fail "$folder holds a $2 with $(<"$file"): give --fresh to start over, or another $1"
    fi
}

stage() {
    local name=$1 product=$2 begin=$SECONDS done=$folder/.done/${1// /-}
    echo
    if [[ -e $done && -e $product ]]; then
        echo "== $name: done before, kept ($product)"
        times+=("$(printf '%-28s %8s' "$name" kept)")
        return
    fi
    echo "== $name"
    "$3"
    mkdir -p "$folder/.done"
    touch "$done"
    times+=("$(printf '%-28s %6d s' "$name" $((SECONDS - begin)))")
}

show() {
    printf '+'
    printf ' %q' "$@"
    echo
    "$@"
}

print_times() {
    echo "== time"
    printf '%s\n' "${times[@]}"
    printf '%-28s %6d s\n' total "$SECONDS"
}
