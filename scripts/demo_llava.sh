#!/usr/bin/env bash
# LLaVA with low-rank adapters on drawn data, in minutes on any machine: draws photos with spoken questions in the layout of
# the course competition on VizWiz, makes a tiny LLaVA and trains it on other drawn scenes, in whole sentences; then
# fine-tunes it with adapters on the photos, and compares its answers with those of the model before. Drawn data: shows
# that the programs work, no evidence on VizWiz.
#
#   bash scripts/demo_llava.sh            # run it again: what is done is kept, what was interrupted goes on
#   bash scripts/demo_llava.sh --fresh    # start over
#
# Makes .venv, or uses the active environment or $PLAINVL_VENV. Everything else goes into one folder. Variables:
#   DEMO_DIR               quickstart/llava
#   DEMO_TRAIN             2000 photos to fine-tune on, one question each (DEMO_VALID 300)
#   DEMO_PRETRAIN          3000 scenes of the training before, four rounds of a conversation each
#   DEMO_EPOCHS            5 epochs with adapters (DEMO_PRETRAIN_EPOCHS 6)
#   DEMO_RANK              16, of the adapters
#   SEED                   0; another one gives other scenes and other start weights
#   NPROC_PER_NODE         1 training process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

BATCH_SIZE=16 # over all processes
folder=${DEMO_DIR:-$ROOT/quickstart/llava}
num_train=${DEMO_TRAIN:-2000} num_valid=${DEMO_VALID:-300} num_pretrain=${DEMO_PRETRAIN:-3000}
epochs=${DEMO_EPOCHS:-5} epochs_before=${DEMO_PRETRAIN_EPOCHS:-6} rank=${DEMO_RANK:-16} seed=${SEED:-0}
need_count DEMO_TRAIN "$num_train" "$BATCH_SIZE" "one batch"
need_count DEMO_VALID "$num_valid"
need_count DEMO_PRETRAIN "$num_pretrain" "$BATCH_SIZE" "one batch"
need_count DEMO_EPOCHS "$epochs"
need_count DEMO_PRETRAIN_EPOCHS "$epochs_before"
need_count DEMO_RANK "$rank"
need_count SEED "$seed" 0
choose_processes "$BATCH_SIZE"
open_folder DEMO_DIR "$folder"
folder=${folder#"$ROOT/"} # short names in what is printed
data=$folder/data start=$folder/start base=$folder/tiny-llava adapter=$folder/tiny-llava-lora eval=$folder/eval
report=$folder/report

case "$#:${1:-}" in
    0:) ;;
    1:--fresh)
        rm -rf "$data" "$start" "$base" "$adapter" "$eval" "$report" "$folder/.done" "$folder/settings.txt" \
            "$folder/drawing.txt"
        ;;
    *) fail "unknown argument $*: only --fresh is taken, sizes are variables (see the head of $0)" ;;
esac
settings="$num_train, $num_valid and $num_pretrain images, $epochs and $epochs_before epochs, rank $rank, seed $seed"
note_settings DEMO_DIR run "$settings"

draw() {
    show python scripts/draw_scenes.py --layout vizwiz --output "$data" --num_train "$num_train" \
        --num_val "$num_valid" --num_pretrain "$num_pretrain" --seed "$seed" | tee "$folder/drawing.txt"
}

make_start() {
    show python scripts/make_tiny_llava.py --data "$data" --output "$start" --seed "$seed" --overwrite
}

# train MODEL OUTPUT FLAG…
train() {
    local model=$1 output=$2
    shift 2
    show torchrun --standalone --nproc_per_node="$processes" run_llava_lora.py --model_name_or_path "$model" \
        --output_dir "$output" --version v1 --image_aspect_ratio pad --gradient_checkpointing False --bf16 False \
        --per_device_train_batch_size $((BATCH_SIZE / processes)) --dataloader_num_workers "$num_workers" \
        --logging_steps 50 --seed "$seed" "$@"
}

pretrain() {
    train "$start" "$base" --lora_enable False --unfreeze_mm_vision_tower True --learning_rate 1e-3 \
        --num_train_epochs "$epochs_before" --data_path "$data/pretrain_for_llava.json" --image_folder "$data/pretrain"
}

format() {
    show python scripts/format_dataset_for_llava.py --data_path "$data"
}

fine_tune() {
    train "$base" "$adapter" --lora_enable True --lora_r "$rank" --lora_alpha $((2 * rank)) --learning_rate 2e-3 \
        --mm_projector_lr 1e-3 --num_train_epochs "$epochs" --data_path "$data/train_for_llava.json" \
        --image_folder "$data/train"
}

# answer NAME FLAG…
answer() {
    local name=$1
    shift
    show python scripts/model_vqa_loader.py --question-file "$data/valid_for_llava.jsonl" \
        --image-folder "$data/valid" --annotations "$data/valid_annotations.json" \
        --answers-file "$eval/$name.jsonl" --batch_size 32 --num_workers 0 --max_new_tokens 24 "$@"
}

answer_before() {
    answer frozen --model-path "$base"
}

answer_after() {
    answer lora --model-path "$adapter" --model-base "$base"
}

compare() {
    mkdir -p "$report"
    show python scripts/make_vizwiz_report.py --answers "$eval/lora.jsonl" --compare "$eval/frozen.jsonl" \
        --compare_name "Frozen model" --annotations "$data/valid_annotations.json" --image_folder "$data/valid" \
        --run "$adapter" --output "$report" --title "A tiny LLaVA on drawn photos" | tee "$report/table.txt"
}

echo "== environment"
make_environment requirements.txt

stage "draw photos" "$data/drawn_scenes.json" draw
stage "make tiny LLaVA" "$start/config.json" make_start
stage "train it on other scenes" "$base/config.json" pretrain
stage "format data" "$data/train_for_llava.json" format
stage "answer, frozen model" "$eval/frozen.jsonl" answer_before
stage "fine-tune with adapters" "$adapter/adapter_config.json" fine_tune
stage "answer, with adapters" "$eval/lora.jsonl" answer_after
stage "report" "$report/report.html" compare

echo
echo "== accuracy on $num_valid new photos (rule of the course)"
sed -n '/without looking/,$p' "$folder/drawing.txt"
grep -v -e '^+' -e '^wrote' "$report/table.txt"
echo
print_times
echo
printf '%-33s%s\n' "pictures and answers:" "$report/report.html" "loss over epochs:" "$report/curves.png" \
    "the model before:" "$base" "its adapters:" "$adapter"
