#!/usr/bin/env bash
# Every fine-tuning strategy of VL-BERT on a small drawn data set with box features: the table of the published study, and
# a plot. Drawn data: shows that the methods work, no evidence on VQAv2.
#
#   bash scripts/compare_strategies.sh            # run it again: what is done is kept, what was interrupted goes on
#   bash scripts/compare_strategies.sh --fresh    # start over
#
# A network of twelve layers is first trained on other scenes; every strategy starts from it. Makes .venv, or uses the
# active environment or $PLAINVL_VENV. Everything else goes into one folder. Variables:
#   COMPARE_DIR               quickstart/strategies
#   COMPARE_TRAIN             600 images to fine-tune on, six questions each (COMPARE_VAL 200)
#   COMPARE_PRETRAIN          1000 images of the training before
#   COMPARE_EPOCHS            8 epochs of each strategy (COMPARE_PRETRAIN_EPOCHS 6)
#   SEED                      0
#   NPROC_PER_NODE            1 training process
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

folder=${COMPARE_DIR:-$ROOT/quickstart/strategies}
num_train=${COMPARE_TRAIN:-600} num_val=${COMPARE_VAL:-200} num_before=${COMPARE_PRETRAIN:-1000}
epochs=${COMPARE_EPOCHS:-8} epochs_before=${COMPARE_PRETRAIN_EPOCHS:-6} seed=${SEED:-0}
need_count COMPARE_TRAIN "$num_train"
need_count COMPARE_VAL "$num_val"
need_count COMPARE_PRETRAIN "$num_before"
need_count COMPARE_EPOCHS "$epochs"
need_count COMPARE_PRETRAIN_EPOCHS "$epochs_before"
need_count SEED "$seed" 0
open_folder COMPARE_DIR "$folder"
case "$#:${1:-}" in
    0:) ;;
    1:--fresh) rm -rf "$folder/data" "$folder/before" "$folder/runs" "$folder/settings.txt" ;;
    *) fail "unknown argument $*: only --fresh is taken, sizes are variables (see the head of $0)" ;;
esac
settings="$num_train, $num_val and $num_before images, $epochs and $epochs_before epochs, seed $seed"
note_settings COMPARE_DIR comparison "$settings"

# name in the table | flags
strategies=(
    "Pretrained Frozen|--strategy pretrained_frozen"
    "Last 4 Trainable|--strategy last_4"
    "Frozen (3,4,10,11)|--strategy specific_k --set NETWORK.VLBERT.FROZEN_LAYERS=[2,3,9,10]"
    "Standard|--strategy standard"
    "SpotTune_Block|--strategy SpotTune_Block"
    "SpotTune|--strategy SpotTune"
    "4 layers from pretrained|--strategy standard --set NETWORK.VLBERT.num_hidden_layers=4"
    "BlockDrop|--strategy BlockDrop"
    "BlockDrop, constrain K = 4|--strategy BlockDrop --set USE_CONSTRAIN_K_LOSS=true"
    "BlockDrop, global decision|--strategy BlockDrop --set USE_CONSTRAIN_K_LOSS=true --set POLICY_GLOBAL_DECISION=true"
)

make_environment requirements.txt
echo "== drawing"
python scripts/draw_scenes.py --regions --output "$folder/data" --num_train "$num_train" --num_val "$num_val" \
    --num_test 10 --seed "$seed" >"$folder/drawing.txt"
python scripts/draw_scenes.py --regions --output "$folder/data_before" --num_train "$num_before" --num_val 100 \
    --num_test 10 --seed $((seed + 1000)) >>"$folder/drawing.txt"

# train DIRECTORY DATA EPOCHS FLAG…
train() {
    local directory=$1 data=$2 epochs=$3
    shift 3
    NPROC_PER_NODE=${NPROC_PER_NODE:-1} bash scripts/dist_run_single.sh "${NPROC_PER_NODE:-1}" vqa/train_end2end.py \
        cfgs/vqa/drawn.yaml "$directory" --set "DATASET.DATASET_PATH=$data" \
        --set "NETWORK.BERT_MODEL_NAME=$data/bert_drawn" --set "TRAIN.END_EPOCH=$epochs" --set OUTPUT_PATH=. \
        --seed "$seed" --no_tensorboard "$@"
}

echo "== training the network that every strategy starts from"
train "$folder/before" "$folder/data_before" "$epochs_before" --from_scratch --build_answers 2 2>"$folder/before.txt" ||
    { tail -n 3 "$folder/before.txt" >&2 && exit 1; }
before=$folder/before/drawn/train2014_train/checkpoint-best
cp "$before/vocab.txt" "$folder/data/bert_drawn/vocab.txt" # the same words have the same numbers

number=0
for entry in "${strategies[@]}"; do
    name=${entry%%|*}
    read -ra flags <<<"${entry#*|}"
    number=$((number + 1))
    run=$folder/runs/$(printf '%02d' "$number")
    echo "== $name"
    mkdir -p "$run"
    echo "$name" >"$run/name.txt"
    train "$run" "$folder/data" "$epochs" --partial-pretrain "$before" \
        --set "DATASET.ANSWER_VOCAB_FILE=$before/answers_vqa.txt" --log_every 5 "${flags[@]}" 2>"$run/log.txt" ||
        { tail -n 3 "$run/log.txt" >&2 && exit 1; }
done

python scripts/compare_strategies.py --runs "$folder/runs" --output "$folder"
