#!/usr/bin/env bash
# Answer the questions of VQA v2 with fine-tuned BEiT-3 weights and write the file for the evaluation server.
#
#   bash scripts/prediction.sh                                    # data and weights at their default places
#   FINETUNE=output/vqav2/checkpoint-best bash scripts/prediction.sh --eval_split val
#   DATA_PATH=/data/vqav2 NPROC_PER_NODE=8 bash scripts/prediction.sh --eval_split test-dev
#
# Flags given here are passed on and win; see run_beit3_finetuning.py --help. Variables and their defaults:
#   MODEL                 the one that a run's checkpoint folder names; beit3_base_patch16_480 for other weights
#   FINETUNE              weights file or checkpoint folder: beit3_base_patch16_480_vqa.pth (large: beit3_large_...)
#   SENTENCEPIECE_MODEL   beside the weights, then beit3.spm here, then in the data folder
#   DATA_PATH             data/vqav2, then dataset; made ready by scripts/make_index.py
#   OUTPUT_DIR            your_prediction: submit_vqav2_<split>.json, top_answers_vqav2_<split>.jsonl, scores
#   BATCH_SIZE            64 per process
# Processes, machines and the Python to use: see scripts/launch.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

flags=(--task vqav2 --eval --batch_size "${BATCH_SIZE:-64}" --output_dir "${OUTPUT_DIR:-your_prediction}")
[[ -z ${MODEL:-} ]] || flags+=(--model "$MODEL")
[[ -z ${DATA_PATH:-} ]] || flags+=(--data_path "$DATA_PATH")
[[ -z ${SENTENCEPIECE_MODEL:-} ]] || flags+=(--sentencepiece_model "$SENTENCEPIECE_MODEL")
[[ -z ${FINETUNE:-} ]] || flags+=(--finetune "$FINETUNE")

launch run_beit3_finetuning.py scripts.beit3_args "${flags[@]}" "$@"
