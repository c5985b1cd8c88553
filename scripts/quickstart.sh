#!/usr/bin/env bash
# The whole of plainvl in a few minutes, on any machine: draw a small data set in the layout of VQA v2 or of COCO captions
# and NoCaps, train a tokenizer and a tiny BEiT-3 on it from random weights, answer new questions or caption new images,
# and show what came out.
#
#   bash scripts/quickstart.sh              # questions; run it again: what is done is kept, what was interrupted goes on
#   bash scripts/quickstart.sh captioning   # captions
#   bash scripts/quickstart.sh --fresh      # start over
#
# Makes .venv, or uses the active environment or $PLAINVL_VENV. Everything else goes into one folder. Variables:
#   QUICKSTART_DIR      quickstart; captions: quickstart/captioning
#   QUICKSTART_TRAIN    3000 train images, six questions or five captions each (QUICKSTART_VAL 300, QUICKSTART_TEST 300)
#   QUICKSTART_EPOCHS   the recipe's, see scripts/beit3_args.py
#   SEED                0; another one gives other scenes and other start weights
#   NPROC_PER_NODE      1 training process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

MODEL=beit3_tiny_patch32_96
BATCH_SIZE=32 # the recipe's, over all processes
LEAST_TRAIN=40 # images: of fewer, too few questions have an answer that is frequent enough for a label
task=vqav2
if [[ ${1:-} == captioning ]]; then
    task=coco_captioning
    shift
fi
folder=$ROOT/quickstart
[[ $task == vqav2 ]] || folder=$folder/captioning
folder=${QUICKSTART_DIR:-$folder}
num_train=${QUICKSTART_TRAIN:-3000} num_val=${QUICKSTART_VAL:-300} num_test=${QUICKSTART_TEST:-300} seed=${SEED:-0}
epochs=${QUICKSTART_EPOCHS:-}
need_count QUICKSTART_TRAIN "$num_train" "$LEAST_TRAIN" "fewer fill no batch"
need_count QUICKSTART_VAL "$num_val"
need_count QUICKSTART_TEST "$num_test" 2 "pictures change places"
[[ -z $epochs ]] || need_count QUICKSTART_EPOCHS "$epochs"
need_count SEED "$seed" 0
choose_processes "$BATCH_SIZE"
open_folder QUICKSTART_DIR "$folder"
folder=${folder#"$ROOT/"} # short names in what is printed
data=$folder/data run=$folder/run before=$folder/before prediction=$folder/prediction report=$folder/report

case "$#:${1:-}" in
    0:) ;;
    1:--fresh) rm -rf "$data" "$run" "$before" "$prediction" "$report" "$folder/.done" "$folder/settings.txt" ;;
    *) fail "unknown argument $*: only captioning and --fresh are taken, sizes are variables (see the head of $0)" ;;
esac

settings="$num_train train, $num_val val and $num_test test images, epochs: ${epochs:-recipe}, seed $seed"
[[ $task == vqav2 ]] || settings="captions, $settings"
note_settings QUICKSTART_DIR run "$settings"

draw() {
    local layout=vqav2
    [[ $task == vqav2 ]] || layout=captions
    show python scripts/draw_scenes.py --layout "$layout" --output "$data" \
        --num_train "$num_train" --num_val "$num_val" --num_test "$num_test" --seed "$seed"
}

train_tokenizer() {
    local texts=$data/vqa/v2_OpenEnded_mscoco_train2014_questions.json
    [[ $task == vqav2 ]] || texts=$data/dataset_coco.json
    show python scripts/train_sentencepiece.py --output "$data/beit3.spm" --input "$texts"
}

index() {
    show python scripts/make_index.py "$task" --data_path "$data" --sentencepiece_model "$data/beit3.spm"
}

# train FOLDER FLAG…
train() {
    local output=$1
    shift
    local flags=(--task "$task" --model "$MODEL" --data_path "$data" --sentencepiece_model "$data/beit3.spm")
    flags+=(--output_dir "$output" --seed "$seed")
    flags+=(--batch_size $((BATCH_SIZE / processes)) --num_workers "$num_workers")
    [[ -z $epochs ]] || flags+=(--epochs "$epochs")
    show torchrun --standalone --nproc_per_node="$processes" run_beit3_finetuning.py "${flags[@]}" "$@"
}

fine_tune() {
    # an interrupted run goes on from its last epoch
    train "$run" --log_dir "$run/tensorboard" --log_every 100 --save_ckpt_freq 1 --keep_ckpts 1
}

# predict LAUNCHER WEIGHTS FOLDER FLAG…
predict() {
    local launcher=$1 weights=$2 output=$3
    shift 3
    show env MODEL="$MODEL" FINETUNE="$weights" DATA_PATH="$data" SENTENCEPIECE_MODEL="$data/beit3.spm" \
        OUTPUT_DIR="$output" NPROC_PER_NODE=1 bash "scripts/$launcher" --eval_split test "$@"
}

answer() {
    predict prediction.sh "$run/checkpoint-best" "$prediction"
}

answer_shuffled() {
    predict prediction.sh "$run/checkpoint-best" "$prediction" --shuffle_images --seed "$seed"
}

caption() {
    predict predict_captions.sh "$run/checkpoint-best" "$prediction" --caption_metrics basic
}

caption_untrained() {
    train "$before" --max_steps 1 --no_validation # the rate of the first step is 0: these are the start weights
    predict predict_captions.sh "$before/checkpoint-step1" "$before" --caption_metrics basic
}

report_answers() {
    mkdir -p "$report"
    show python scripts/make_report.py --run "$run" --data_path "$data" --split test \
        --predictions "$prediction/submit_vqav2_test.json" --output "$report" \
        --title "Quick start: a tiny BEiT-3 on drawn scenes" | tee "$report/table.txt"
}

report_captions() {
    mkdir -p "$report"
    show python scripts/make_caption_report.py --run "$run" --data_path "$data" --split test \
        --predictions "$prediction/captions_coco_captioning_test.jsonl" \
        --before "$before/captions_coco_captioning_test.jsonl" --output "$report" \
        --title "Quick start: a tiny BEiT-3 describes drawn scenes" | tee "$report/table.txt"
}

echo "== environment"
make_environment requirements.txt
times+=("$(printf '%-28s %6d s' environment "$SECONDS")")

stage "draw scenes" "$data/drawn_scenes.json" draw
stage "train sentencepiece" "$data/beit3.spm" train_tokenizer
if [[ $task == vqav2 ]]; then
    stage "build index" "$data/answer2label.txt" index
    stage "fine-tune" "$run/checkpoint-best" fine_tune
    stage "predict" "$prediction/submit_vqav2_test.json" answer
    stage "predict, shuffled images" "$prediction/submit_vqav2_test_shuffled_images.json" answer_shuffled
    stage "report" "$report/report.html" report_answers
    heading="accuracy on $num_test new images" curve="loss and accuracy over epochs:" file="answers for the server:"
else
    stage "build index" "$data/coco_captioning.train.jsonl" index
    stage "caption, untrained" "$before/submit_coco_captioning_test.json" caption_untrained
    stage "fine-tune" "$run/checkpoint-best" fine_tune
    stage "caption" "$prediction/submit_coco_captioning_test.json" caption
    stage "report" "$report/report.html" report_captions
    heading="scores of $num_test new images" curve="loss and CIDEr over epochs:" file="captions for the server:"
fi

echo
echo "== $heading"
grep -v -e '^+' -e '^wrote' "$report/table.txt"
echo
print_times
echo
printf '%-33s%s\n' "pictures and texts:" "$report/report.html" "$curve" "$report/curves.png" \
    "$file" "$prediction/submit_${task}_test.json" "the trained model:" "$run/checkpoint-best"
