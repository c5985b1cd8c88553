#!/usr/bin/env bash
# LLaVA on VizWiz from data to submission, as the course competition's pipeline does it: format the data, fine-tune with
# adapters, answer, write submission.npy and the VizWiz server's JSON.
#
#   bash scripts/main.sh
#   source scripts/main.sh                       # the same: no setting, variable or exit of it reaches your shell
#   MODEL=checkpoints/llava-v1.5-13b NPROC_PER_NODE=8 bash scripts/main.sh --deepspeed scripts/zero3.json
#
# Flags are passed on to run_llava_lora.py, whose defaults are the recipe; the same command again goes on where it was
# stopped; with --dry_run it ends after the dry run of the training. Variables and their defaults:
#   MODEL            checkpoints/llava-v1.5-7b, the folder of the model; CLIP's lies beside it (docs/llava.md)
#   DATA_PATH        data: train.json, valid.json, train/, valid/ of the course, or VizWiz's train, val and test
#   FORMAT_FLAGS     none; such as "--vizwiz_prompt --hold_out 0.05" (scripts/format_dataset_for_llava.py)
#   QUESTION_FILE    valid_for_llava.jsonl, without data/valid/ test_for_llava.jsonl (IMAGE_FOLDER: valid/, test/)
#   OUTPUT_DIR       checkpoints/<model>-finetune_lora: the adapter, its checkpoints, log.txt
#   MERGED_DIR       none; a folder for the model with the adapter in its weights, which loads without its base
#   EVAL_DIR         eval: answers (.jsonl) and the VizWiz server's file (.json), named <model>-lora, with an OUTPUT_DIR
#                    like that folder
#   SUBMISSION       submission.npy, of whichever run wrote it last
#   EVAL_FLAGS       none; such as "--num_beams 3 --normalize process_text" (scripts/model_vqa_loader.py)
# Processes, machines and the Python to use: see scripts/launch.sh.
if [ -z "${PLAINVL_MAIN:-}" ]; then
    ( # a shell of its own, also when this one is sourced; it gets the variables that are set here but not exported
        export PLAINVL_MAIN=1 MODEL DATA_PATH FORMAT_FLAGS QUESTION_FILE IMAGE_FOLDER OUTPUT_DIR MERGED_DIR EVAL_DIR
        export SUBMISSION EVAL_FLAGS NPROC_PER_NODE OMP_NUM_THREADS PLAINVL_VENV PLAINVL_PRINT
        exec bash "${BASH_SOURCE[0]:-$0}" "$@"
    )
else
    unset PLAINVL_MAIN
    set -euo pipefail
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,/^if /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit
    fi
    source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
    find_python

    model=${MODEL:-checkpoints/llava-v1.5-7b}
    name=$(basename "$model")
    data=${DATA_PATH:-data}
    output=${OUTPUT_DIR:-checkpoints/$name-finetune_lora}
    result=$name-lora # another run's answers to the same questions stay where they are
    [[ -z ${OUTPUT_DIR:-} ]] || result=$(basename "$output")
    eval=${EVAL_DIR:-eval}
    split=valid
    [[ -d $data/valid || ! -d $data/test ]] || split=test
    questions=${QUESTION_FILE:-$data/${split}_for_llava.jsonl}
    images=${IMAGE_FOLDER:-$data/$split}
    here=
    [[ $PWD == "$ROOT" ]] || here=$ROOT/

    training=(--model_name_or_path "$model" --data_path "$data/train_for_llava.json" --image_folder "$data/train")
    training+=(--output_dir "$output")
    answering=(--model-path "$output" --model-base "$model" --question-file "$questions" --image-folder "$images")
    answering+=(--answers-file "$eval/$result.jsonl" --upload-file "$eval/$result.json")
    # shellcheck disable=SC2206  # several flags in one variable
    answering+=(--submission-file "${SUBMISSION:-submission.npy}" ${EVAL_FLAGS:-})

    if [[ -z ${PLAINVL_PRINT:-} ]]; then # before anything is written, and before hours of training
        need_number NPROC_PER_NODE "a number of processes" "${NPROC_PER_NODE:-1}"
        check_flags scripts.llava_args:parse_args_before_data "${training[@]}" "$@"
        [[ -d $images ]] || fail "no folder $images with the images to ask about: give IMAGE_FOLDER"
        check_flags scripts.model_vqa_loader:parse_args_and_outputs "${answering[@]}"
    fi

    # run COMMAND…: print it instead where PLAINVL_PRINT asks for that
    run() {
        if [[ -n ${PLAINVL_PRINT:-} ]]; then
            printf '%q ' "$@"
            echo
        else
            "$@"
        fi
    }

    # shellcheck disable=SC2086
    run "$PYTHON" "${here}scripts/format_dataset_for_llava.py" --data_path "$data" ${FORMAT_FLAGS:-}
    (launch run_llava_lora.py scripts.llava_args "${training[@]}" "$@")
    if [[ " $* " == *" --dry_run "* ]]; then
        echo "dry run: nothing was trained, so nothing is answered"
        exit
    fi
    if [[ -n ${MERGED_DIR:-} ]]; then
        run "$PYTHON" "${here}scripts/merge_lora_weights.py" --model-path "$output" --model-base "$model" \
            --save-model-path "$MERGED_DIR" --overwrite
    fi
    (launch scripts/model_vqa_loader.py scripts.model_vqa_loader "${answering[@]}")
fi
