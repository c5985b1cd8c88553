#!/usr/bin/env bash
# Fine-tune BEiT-3 on COCO captions: base model, 480 x 480, 10 epochs.
#
#   bash scripts/finetune_captioning.sh                           # data and weights at their default places
#   DATA_PATH=/data/coco NPROC_PER_NODE=8 bash scripts/finetune_captioning.sh --epochs 5
#   TASK=nocaps MODEL=beit3_large_patch16_480 bash scripts/finetune_captioning.sh
#
# Learning rate, epochs, masking and the rest of the recipe are the program's defaults for the task and the model's size;
# see run_beit3_finetuning.py --help. Flags given here are passed on and win. Variables and their defaults:
#   TASK                  coco_captioning; nocaps trains on the same captions and validates on NoCaps
#   MODEL                 the one that FINETUNE names, if it is a run's checkpoint folder; else beit3_base_patch16_480
#   FINETUNE              weights to start from: beit3_base_patch16_224.pth (large: beit3_large_patch16_224.pth)
#   SENTENCEPIECE_MODEL   beit3.spm here, then in the data folder
#   DATA_PATH             data/coco, then dataset; made ready by scripts/make_index.py
#   OUTPUT_DIR            output/$TASK: checkpoints, log.txt; the same command again goes on from the last checkpoint
#   LOG_DIR               TensorBoard files: $OUTPUT_DIR/tensorboard
# Processes, machines and the Python to use: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

TASK=${TASK:-coco_captioning}
OUTPUT_DIR=${OUTPUT_DIR:-output/$TASK}
flags=(--task "$TASK" --output_dir "$OUTPUT_DIR" --log_dir "${LOG_DIR:-$OUTPUT_DIR/tensorboard}")
[[ -z ${MODEL:-} ]] || flags+=(--model "$MODEL")
[[ -z ${DATA_PATH:-} ]] || flags+=(--data_path "$DATA_PATH")
[[ -z ${SENTENCEPIECE_MODEL:-} ]] || flags+=(--sentencepiece_model "$SENTENCEPIECE_MODEL")
[[ -z ${FINETUNE+set} ]] || flags+=(--finetune "$FINETUNE") # FINETUNE= (empty): random weights

launch run_beit3_finetuning.py scripts.beit3_args "${flags[@]}" "$@"
