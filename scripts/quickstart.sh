#!/usr/bin/env bash
# The whole of plainvl in a few minutes, on any machine: draw a small data set in the layout of VQA v2, train a tokenizer
# and a tiny BEiT-3 on it from random weights, answer new questions, and show the answers.
#
#   bash scripts/quickstart.sh              # run it again: what is done is kept, what was interrupted goes on
#   bash scripts/quickstart.sh --fresh      # start over
#
# Makes .venv, or uses the active environment or $PLAINVL_VENV. Everything else goes into one folder. Variables:
#   QUICKSTART_DIR      quickstart
#   QUICKSTART_TRAIN    3000 train images, six questions each (QUICKSTART_VAL 300, QUICKSTART_TEST 300)
#   QUICKSTART_EPOCHS   the recipe's, see scripts/beit3_args.py
#   SEED                0; another one gives other scenes and other start weights
#   NPROC_PER_NODE      1 training process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

MODEL=beit3_tiny_patch32_96
BATCH_SIZE=32 # the recipe's, over all processes
folder=${QUICKSTART_DIR:-$ROOT/quickstart}
mkdir -p "$folder" || fail "cannot make QUICKSTART_DIR=$folder: choose another folder"
folder=$(cd "$folder" && pwd)
num_train=${QUICKSTART_TRAIN:-3000} num_val=${QUICKSTART_VAL:-300} num_test=${QUICKSTART_TEST:-300} seed=${SEED:-0}
epochs=${QUICKSTART_EPOCHS:-}
cd "$ROOT"
folder=${folder#"$ROOT/"} # short names in what is printed
data=$folder/data run=$folder/run prediction=$folder/prediction report=$folder/report

case "$#:${1:-}" in
    0:) ;;
    1:--fresh) rm -rf "$data" "$run" "$prediction" "$report" "$folder/.done" "$folder/settings.txt" ;;
    *) fail "unknown argument $*: only --fresh is taken, sizes are variables (see the head of $0)" ;;
esac

settings="$num_train train, $num_val val and $num_test test images, epochs: ${epochs:-recipe}, seed $seed"
if [[ -e $folder/settings.txt && $(<"$folder/settings.txt") != "$settings" ]]; then
    fail "$folder holds a run with $(<"$folder/settings.txt"): give --fresh to start over, or another QUICKSTART_DIR"
fi
[[ -e $folder/settings.txt ]] || echo "$settings" >"$folder/settings.txt"

times=()

# stage NAME PRODUCT FUNCTION: run it unless an earlier run finished it and its product is still there
stage() {
    local name=$1 product=$2 start=$SECONDS done=$folder/.done/${1// /-}
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
    times+=("$(printf '%-28s %6d s' "$name" $((SECONDS - start)))")
}

# print a command, then run it
show() {
    printf '+'
    printf ' %q' "$@"
    echo
    "$@"
}

draw() {
    show python scripts/draw_scenes.py --output "$data" \
        --num_train "$num_train" --num_val "$num_val" --num_test "$num_test" --seed "$seed"
}

train_tokenizer() {
    show python scripts/train_sentencepiece.py --output "$data/beit3.spm" \
        --input "$data/vqa/v2_OpenEnded_mscoco_train2014_questions.json"
}

index() {
    show python scripts/make_index.py vqav2 --data_path "$data" --sentencepiece_model "$data/beit3.spm"
}

fine_tune() {
    local flags=(--task vqav2 --model "$MODEL" --data_path "$data" --sentencepiece_model "$data/beit3.spm")
    flags+=(--output_dir "$run" --log_dir "$run/tensorboard" --seed "$seed")
    flags+=(--batch_size $((BATCH_SIZE / processes)) --num_workers "$num_workers")
    flags+=(--log_every 100 --save_ckpt_freq 1 --keep_ckpts 1) # an interrupted run goes on from its last epoch
    [[ -z $epochs ]] || flags+=(--epochs "$epochs")
    show torchrun --standalone --nproc_per_node="$processes" run_beit3_finetuning.py "${flags[@]}"
}

predict() {
    show env MODEL="$MODEL" FINETUNE="$run/checkpoint-best" DATA_PATH="$data" SENTENCEPIECE_MODEL="$data/beit3.spm" \
        OUTPUT_DIR="$prediction" NPROC_PER_NODE=1 bash scripts/prediction.sh --eval_split test "$@"
}

predict_shuffled() {
    predict --shuffle_images --seed "$seed"
}

make_report() {
    mkdir -p "$report"
    show python scripts/make_report.py --run "$run" --data_path "$data" --split test \
        --predictions "$prediction/submit_vqav2_test.json" --output "$report" \
        --title "Quick start: a tiny BEiT-3 on drawn scenes" | tee "$report/table.txt"
}

echo "== environment"
make_environment requirements.txt
times+=("$(printf '%-28s %6d s' environment "$SECONDS")")
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
# One thread computes, and on two cores one process beside it reads pictures. Two computing threads were far slower where
# other programs also wanted the cores: in a network this small they mostly wait for each other.
processes=${NPROC_PER_NODE:-1}
num_workers=$((cores > 2 ? 2 : cores - 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

stage "draw scenes" "$data/drawn_scenes.json" draw
stage "train sentencepiece" "$data/beit3.spm" train_tokenizer
stage "build index" "$data/answer2label.txt" index
stage "fine-tune" "$run/checkpoint-best" fine_tune
stage "predict" "$prediction/submit_vqav2_test.json" predict
stage "predict, shuffled images" "$prediction/submit_vqav2_test_shuffled_images.json" predict_shuffled
stage "report" "$report/report.html" make_report

echo
echo "== accuracy on $num_test new images"
grep -v -e '^+' -e '^wrote' "$report/table.txt"
echo
echo "== time"
printf '%s\n' "${times[@]}"
printf '%-28s %6d s\n' total "$SECONDS"
echo
echo "pictures, questions and answers: $report/report.html"
echo "loss and accuracy over epochs:   $report/curves.png"
echo "answers for the server:          $prediction/submit_vqav2_test.json"
echo "the trained model:               $run/checkpoint-best"
