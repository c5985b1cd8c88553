# Sourced by scripts/test.sh, scripts/stages.sh and the launchers: which Python runs plainvl, and how it comes to be.
#
#   find_python             PYTHON becomes the Python of $PLAINVL_VENV, else of the active environment, else of .venv,
#                           else the one on PATH; nothing is made or installed
#   make_environment FILE…  makes $PLAINVL_VENV (or, with no environment active, .venv) if it is not there, installs
#                           what the requirement files ask for and lacks, and activates it for this script
#
# Besides: ROOT, the folder of plainvl; fail, need_number and count_cores.
# A conda environment counts as active unless it is conda's base.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -n ${PLAINVL_VENV:-} && $PLAINVL_VENV != /* ]]; then
    export PLAINVL_VENV=$PWD/$PLAINVL_VENV # the scripts change folder
fi

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

# need_number NAME WHAT VALUE: a whole number above 0, or the end
need_number() {
    [[ $3 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be $2, got '$3'"
}

count_cores() {
    nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
}

active_environment() {
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        echo "$VIRTUAL_ENV"
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
        echo "$CONDA_PREFIX"
    fi
}

find_python() {
    local folder
    if [[ -n ${PLAINVL_VENV:-} && ! -x $PLAINVL_VENV/bin/python ]]; then
        fail "PLAINVL_VENV=$PLAINVL_VENV has no bin/python: scripts/quickstart.sh makes it, or unset PLAINVL_VENV"
    fi
    for folder in "${PLAINVL_VENV:-}" "$(active_environment)" "$ROOT/.venv"; do
        if [[ -n $folder && -x $folder/bin/python ]]; then
            PYTHON=$folder/bin/python
            return
        fi
    done
    PYTHON=$(command -v python3 || command -v python) || fail "no python3 on PATH: install Python 3.10 or newer"
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# The first Python on PATH that is new enough, by its full name.
base_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

make_environment() {
    local venv=${PLAINVL_VENV:-$(active_environment)} base file requirements=()
    venv=${venv:-$ROOT/.venv}
    if [[ ! -x $venv/bin/python ]]; then
        if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
            fail "$venv is not a virtual environment and not empty: set PLAINVL_VENV to another folder"
        fi
        base=$(base_python) || fail "no Python 3.10 or newer on PATH: install one, or activate an environment"
        echo "making the virtual environment $venv with $("$base" --version)"
        "$base" -m venv "$venv" ||
            fail "cannot make $venv (on Debian and Ubuntu install python3-venv), or activate an environment of your own"
    fi
    PYTHON=$venv/bin/python
    is_new_enough "$PYTHON" || fail "$PYTHON is older than Python 3.10: set PLAINVL_VENV to another folder"
    # an interrupted first run can leave an environment without pip
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
        fail "$PYTHON has no pip: install pip into it, or set PLAINVL_VENV to another folder"
    for file in "$@"; do
        requirements+=(--requirement "$ROOT/$file")
    done
    echo "installing into $venv what is missing of: $* (the first time takes minutes and 6 GB, then seconds)"
    if ! "$PYTHON" -m pip install --quiet --no-input --disable-pip-version-check "${requirements[@]}" </dev/null; then
        echo "$(basename "$0"): error: pip could not install $* (its reason is above): mend it and run the same again" >&2
        exit 1
    fi
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
}
