#!/usr/bin/env bash
# Caption images with fine-tuned BEiT-3 weights, write the file for the evaluation server, and score it where the
# captions of people are there.
#
#   bash scripts/predict_captions.sh                              # data and weights at their default places
#   FINETUNE=output/coco_captioning/checkpoint-best bash scripts/predict_captions.sh --eval_split val
#   TASK=nocaps NPROC_PER_NODE=8 bash scripts/predict_captions.sh
#   FINETUNE=output/coco_captioning/checkpoint-best bash scripts/predict_captions.sh --eval_split my_photos
#
# Flags given here are passed on and win; see run_beit3_finetuning.py --help. Variables and their defaults:
#   TASK                  coco_captioning, or nocaps
#   MODEL                 the one that a run's checkpoint folder names; beit3_base_patch16_480 for other weights
#   FINETUNE              weights file or checkpoint folder: beit3_base_patch16_480_<task>.pth (large: beit3_large_...)
#   SENTENCEPIECE_MODEL   beside the weights, then beit3.spm here, then in the data folder
#   DATA_PATH             data/coco, then dataset; made ready by scripts/make_index.py; a folder of images needs none
#   OUTPUT_DIR            your_prediction: submit_<task>_<split>.json, captions_<task>_<split>.jsonl, scores
#   BATCH_SIZE            16 per process
# Processes, machines and the Python to use: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

flags=(--task "${TASK:-coco_captioning}" --eval --batch_size "${BATCH_SIZE:-16}")
flags+=(--output_dir "${OUTPUT_DIR:-your_prediction}")
[[ -z ${MODEL:-} ]] || flags+=(--model "$MODEL")
[[ -z ${DATA_PATH:-} ]] || flags+=(--data_path "$DATA_PATH")
[[ -z ${SENTENCEPIECE_MODEL:-} ]] || flags+=(--sentencepiece_model "$SENTENCEPIECE_MODEL")
[[ -z ${FINETUNE:-} ]] || flags+=(--finetune "$FINETUNE")

launch run_beit3_finetuning.py scripts.beit3_args "${flags[@]}" "$@"
