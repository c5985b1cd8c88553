#!/usr/bin/env bash
# Fine-tune BEiT-3 on VQA v2 (the original guide's bash.sh): base model, 480 x 480, 10 epochs.
#
#   bash scripts/finetune_vqav2.sh                                # data and weights at their default places
#   DATA_PATH=/data/vqav2 NPROC_PER_NODE=8 bash scripts/finetune_vqav2.sh --epochs 5
#   MODEL=beit3_large_patch16_480 OUTPUT_DIR=output/large bash scripts/finetune_vqav2.sh
#
# Learning rate, epochs, augmentation and the rest of the recipe are the program's defaults for the task and the model's
# size; see run_beit3_finetuning.py --help. Flags given here are passed on and win. Variables and their defaults:
#   MODEL                 the one that FINETUNE names, if it is a run's checkpoint folder; else beit3_base_patch16_480
#   FINETUNE              weights to start from: beit3_base_patch16_224.pth (large: beit3_large_patch16_224.pth)
#   SENTENCEPIECE_MODEL   beit3.spm here, then in the data folder
#   DATA_PATH             data/vqav2, then dataset; made ready by scripts/make_index.py
#   OUTPUT_DIR            output/vqav2: checkpoints, log.txt; the same command again goes on from the last checkpoint
#   LOG_DIR               TensorBoard files: $OUTPUT_DIR/tensorboard
# Processes, machines and the Python to use: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

OUTPUT_DIR=${OUTPUT_DIR:-output/vqav2}
flags=(--task vqav2 --output_dir "$OUTPUT_DIR" --log_dir "${LOG_DIR:-$OUTPUT_DIR/tensorboard}")
[[ -z ${MODEL:-} ]] || flags+=(--model "$MODEL")
[[ -z ${DATA_PATH:-} ]] || flags+=(--data_path "$DATA_PATH")
[[ -z ${SENTENCEPIECE_MODEL:-} ]] || flags+=(--sentencepiece_model "$SENTENCEPIECE_MODEL")
[[ -z ${FINETUNE+set} ]] || flags+=(--finetune "$FINETUNE") # FINETUNE= (empty): random weights

launch run_beit3_finetuning.py scripts.beit3_args "${flags[@]}" "$@"
