"""VL-BERT's config files: what is shipped, the originals', look-up, precedence, output folder, sizes of the models."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from data.errors import DataError
from scripts.vlbert_args import output_folder, parse_args, parse_test_args, schedule_steps
from scripts.vlbert_config import CONFIG_ROOT, SCHEMA, Key, as_yaml, find_config, read_config
from scripts.vlbert_model import build_network
from scripts.vqa.train_end2end import count_parameters

SHIPPED = sorted(str(path.relative_to(CONFIG_ROOT)) for path in CONFIG_ROOT.glob("cfgs/vqa*/*.yaml"))
# what the published study ran: config → strategy, trained, frozen and policy parameters in millions
ROWS = {
    "base_4X16G_fp32": ("standard", 115, 0, 0),
    "base_pretrained_frozen": ("pretrained_frozen", 30, 85, 0),
    "base_last_4": ("last_4", 58, 57, 0),
    "base_frozen_3_4_10_11": ("specific_k", 87, 28, 0),
    "base_spottune": ("SpotTune", 115, 85, 34),
    "base_spottune_block": ("SpotTune_Block", 115, 85, 34),
    "base_4_layers": ("standard", 58, 0, 0),
    "base_blockdrop": ("BlockDrop", 115, 0, 34),
    "base_blockdrop_constrain_k": ("BlockDrop", 115, 0, 34),
    "base_blockdrop_global_decision": ("BlockDrop", 115, 0, 34),
    "large_4X16G_fp32": ("standard", 343, 0, 0),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_shipped_configs_have_the_published_strategies_and_sizes(name):
    strategy, trained, frozen, policy = ROWS[name]
    config = parse_args([f"cfgs/vqa/{name}.yaml"]).config
    assert config["FINETUNE_STRATEGY"] == strategy
    words = SimpleNamespace(cls_id=101, sep_id=102, mask_id=103)
    with torch.device("meta"):
        model = build_network(config, 3129, words, reference=False)
    found = count_parameters(model)
    assert round(found["parameters_trained"] / 1e6) == trained
    assert round(found["parameters_frozen"] / 1e6) == frozen
    assert round(found.get("parameters_policy", 0) / 1e6) == policy


def test_every_published_row_is_shipped_and_every_shipped_file_is_read():
    names = {Path(name).stem for name in SHIPPED if name.startswith("cfgs/vqa/")}
    assert names == {*ROWS, "drawn", "base_image_path"}
    for name in SHIPPED:
        assert read_config(CONFIG_ROOT / name)["TRAIN"]["OPTIMIZER"] == "AdamW"
    assert parse_args(["cfgs/vqa_cp/base_4X16G_fp32.yaml"]).config["DATASET"]["DATASET"] == "vqa_cp"


def test_the_values_of_the_published_runs():
    config = parse_args([]).config
    train = config["TRAIN"]
    assert (train["LR"], train["WD"], train["CLIP_GRAD_NORM"]) == (6.25e-7, 1e-4, 1.0)
    assert (train["LR_SCHEDULE"], train["WARMUP_STEPS"], train["END_EPOCH"], train["BATCH_IMAGES"]) == (
        "triangle", 500, 10, 16,
    )  # fmt: skip
    assert (config["RNG_SEED"], config["SCALES"]) == (12345, [600, 1000])
    assert (config["POLICY"]["VLBERT"]["num_hidden_layers"], config["POLICY"]["VLBERT"]["intermediate_size"]) == (
        2,
        512,
    )
    large = parse_args(["cfgs/vqa/large_4X16G_fp32.yaml"]).config
    assert (large["TRAIN"]["GRAD_ACCUMULATE_STEPS"], large["NETWORK"]["VLBERT"]["num_attention_heads"]) == (4, 16)


# every key that the originals' own files have, with other values than ours where they differ
ORIGINAL = """---
RNG_SEED: 12345
OUTPUT_PATH: './output/vl-bert/vqa'
MODULE: ResNetVLBERT
POLICY_MODULE: PolicyResNetVLBERT
FINETUNE_STRATEGY: 'BlockDrop'
GPUS: '0,1,2,3'
LOG_FREQUENT: 100
VAL_FREQUENT: 1
CHECKPOINT_FREQUENT: 1
MODEL_PREFIX: 'vl-bert_base_res101_vqa'
NUM_WORKERS_PER_GPU: 4
VERSION: 'blockdrop'
SCALES:
- 600
- 1000
USE_CONSTRAIN_K_LOSS: true
CONSTRAIN_K_NUM_BLOCKS: 4
CONSTRAIN_K_SCALE: 1
USE_DETERMINISTIC_POLICY_LOSS: true
DETERMINISTIC_POLICY_SCALE: 1
DATASET: {DATASET: vqa, ANSWER_VOCAB_FILE: a.txt, LABEL_INDEX_IN_BATCH: -1, APPEND_INDEX: false, ROOT_PATH: './',
  DATASET_PATH: './data/coco', TRAIN_IMAGE_SET: 'train2014+val2014', VAL_IMAGE_SET: 'val2014', ZIP_MODE: false,
  TEST_IMAGE_SET: 'test2015', ADD_IMAGE_AS_A_BOX: true, CACHE_MODE: false, IGNORE_DB_CACHE: false, MASK_SIZE: 14,
  BOXES: "10-100ada", USE_IMDB: false, TOY: false, TOY_SAMPLES: 128}
NETWORK: &network
  PARTIAL_PRETRAIN: "vl-bert-base-prec.model"
  PARTIAL_PRETRAIN_PREFIX_CHANGES:
  - "vlbert->vlbert"
  IMAGE_NUM_LAYERS: 101
  IMAGE_C5_DILATED: true
  IMAGE_STRIDE_IN_1x1: true
  PIXEL_MEANS: [102.9801, 115.9465, 122.7717]
  PIXEL_STDS: [1.0, 1.0, 1.0]
  IMAGE_FEAT_PRECOMPUTED: true
  IMAGE_PRETRAINED: ''
  IMAGE_PRETRAINED_EPOCH: 0
  IMAGE_FROZEN_BACKBONE_STAGES: [1, 2]
  IMAGE_FROZEN_BN: true
  IMAGE_FINAL_DIM: 768
  IMAGE_SEMANTIC: false
  OUTPUT_CONV5: false
  BERT_MODEL_NAME: './model/pretrained_model/bert-base-uncased'
  BERT_PRETRAINED: ''
  BERT_PRETRAINED_EPOCH: 0
  BERT_FROZEN: false
  ENABLE_CNN_REG_LOSS: false
  VLBERT: {input_transform_type: 1, visual_size: 768, hidden_size: 768, num_hidden_layers: 12, num_attention_heads: 12,
    intermediate_size: 3072, hidden_act: "gelu", hidden_dropout_prob: 0.1, attention_probs_dropout_prob: 0.1,
    max_position_embeddings: 512, type_vocab_size: 3, vocab_size: 30522, initializer_range: 0.02,
    visual_scale_text_init: 0.0, visual_scale_object_init: 0.0, visual_ln: true, FROZEN_LAYERS: [2,3,9,10]}
  CLASSIFIER_TYPE: "mlm"
  CLASSIFIER_PRETRAINED: true
  CLASSIFIER_DROPOUT: 0.1
POLICY:
  <<: *network
  OPTIMIZER: 'AdamW'
  CLIP_GRAD_NORM: 1.0
  LR: 6.25e-7
  LR_SCHEDULE: 'triangle'
  WD: 0.0001
  WARMUP: true
  WARMUP_METHOD: 'linear'
  WARMUP_FACTOR: 0.0
  WARMUP_STEPS: 500
  OUTPUT_SIZE: 24
TRAIN: {SHUFFLE: true, FLIP_PROB: 0.5, BATCH_IMAGES: 16, ASPECT_GROUPING: false, RESUME: false, AUTO_RESUME: false,
  BEGIN_EPOCH: 0, END_EPOCH: 10, OPTIMIZER: 'AdamW', CLIP_GRAD_NORM: 1.0, LR: 6.25e-7, LR_SCHEDULE: 'triangle',
  WD: 0.0001, WARMUP: true, WARMUP_METHOD: 'linear', WARMUP_FACTOR: 0.0, WARMUP_STEPS: 500, FP16: false,
  FP16_LOSS_SCALE: 128.0}
VAL: {SHUFFLE: false, FLIP_PROB: 0, BATCH_IMAGES: 16}
TEST: {SHUFFLE: false, FLIP_PROB: 0, TEST_EPOCH: 0, BATCH_IMAGES: 16}
"""


def test_a_file_of_the_original_is_read(tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL)
    args = parse_args([str(path)])
    assert args.config["FINETUNE_STRATEGY"] == "BlockDrop"
    assert args.config["TRAIN"]["LR"] == 6.25e-7
    assert args.config["NETWORK"]["VLBERT"]["FROZEN_LAYERS"] == [2, 3, 9, 10]
    assert args.auto_resume is False
    assert args.config["POLICY"]["VLBERT"]["num_hidden_layers"] == 12


def test_the_flag_for_the_strategy_wins_whatever_its_case_and_the_policy_follows(tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(ORIGINAL)
    args = parse_args([str(path), "--strategy", "spottune"])
    assert args.config["FINETUNE_STRATEGY"] == "SpotTune"
    assert args.config["POLICY"]["OUTPUT_SIZE"] == 360
    assert any("POLICY.OUTPUT_SIZE 24 is the config's" in note for note in args.notes)
    plain = parse_args([str(path), "--strategy", "Standard"])
    assert not plain.config["USE_CONSTRAIN_K_LOSS"]
    assert any("USE_CONSTRAIN_K_LOSS has no effect" in note for note in plain.notes)


@pytest.mark.parametrize(
    "name", ["cfgs/vqa/base_4x16G_fp32.yaml", "cfgs/vqa/BASE_4X16G_FP32.YAML", "scripts/cfgs/vqa/base_4X16G_fp32.yaml"]
)
def test_configs_are_found_whatever_their_case_as_given_and_in_scripts(name, monkeypatch):
    monkeypatch.chdir(CONFIG_ROOT.parent)
    assert find_config(name).resolve() == CONFIG_ROOT / "cfgs/vqa/base_4X16G_fp32.yaml"


@pytest.mark.parametrize(
    ("model_dir", "output_path", "folder"),
    [
        ("output", "./output/vl-bert/vqa", "output/vl-bert/vqa/base_4X16G_fp32/train2014_train"),
        ("/runs/output", "./output/vl-bert/vqa", "/runs/output/vl-bert/vqa/base_4X16G_fp32/train2014_train"),
        ("models", "./output/vl-bert/vqa", "models/output/vl-bert/vqa/base_4X16G_fp32/train2014_train"),
        ("models", ".", "models/base_4X16G_fp32/train2014_train"),
    ],
)
def test_the_output_folder_is_inside_the_model_directory_without_a_doubled_folder(model_dir, output_path, folder):
    args = parse_args(["cfgs/vqa/base_4X16G_fp32.yaml", model_dir, f"--set=OUTPUT_PATH={output_path}"])
    assert output_folder(args) == Path(folder)
    assert args.output_dir == folder
    test = parse_test_args(["--model-dir", model_dir, f"--set=OUTPUT_PATH={output_path}"])
    assert test.finetune == f"{folder}/checkpoint-best"


def test_another_strategy_by_flag_has_a_folder_of_its_own():
    args = parse_args(["--strategy", "last_4"])
    assert args.output_dir == "output/vl-bert/vqa/base_4X16G_fp32_last_4/train2014_train"


def test_settings_written_beside_a_checkpoint_can_be_given_again(tmp_path):
    config = parse_args(["cfgs/vqa/base_spottune.yaml", "--set", "TRAIN.LR=1e-5"]).config
    path = tmp_path / "config.yaml"
    path.write_bytes(as_yaml(config))
    assert read_config(path) == config


def test_nothing_is_checked_less_than_the_schema_says():
    def keys(schema: dict, section: str = "") -> list[tuple[str, Key]]:
        found = []
        for name, entry in schema.items():
            found += [(section + name, entry)] if isinstance(entry, Key) else keys(entry, f"{section}{name}.")
        return found

    for name, entry in keys(SCHEMA):
        if entry.default is not None:
            assert entry.check(entry.default) == entry.default, name
        assert entry.meaning


def test_resume_of_the_config_names_the_checkpoint_of_the_epoch_before():
    args = parse_args(["--set", "TRAIN.RESUME=true", "--set", "TRAIN.BEGIN_EPOCH=3"])
    assert args.resume == "output/vl-bert/vqa/base_4X16G_fp32/train2014_train/checkpoint-2"


def test_36_boxes_may_be_a_number_and_a_zero_stage_asks_for_deepspeed():
    assert parse_args(["--set", "DATASET.BOXES=36"]).config["DATASET"]["BOXES"] == "36"
    args = parse_args(["--zero_stage", "2"])
    assert args.enable_deepspeed
    assert "--zero_stage 2 implies --enable_deepspeed" in args.notes


def test_a_toy_run_takes_the_first_samples():
    assert parse_args(["--set", "DATASET.TOY=true", "--set", "DATASET.TOY_SAMPLES=7"]).limit_samples == 7


def test_epochs_of_the_step_schedule_become_steps():
    assert schedule_steps({"LR_STEP": "2, 3.5"}, 10) == [20, 35]
    assert schedule_steps({"LR_STEP": ""}, 10) == []
    with pytest.raises(DataError, match="must be epochs joined by commas"):
        schedule_steps({"LR_STEP": "a"}, 10)


def test_yaml_floats_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("TRAIN:\n  LR: 1e-6\n")
    assert isinstance(yaml.safe_load(path.read_text())["TRAIN"]["LR"], str)  # YAML 1.1
    assert read_config(path)["TRAIN"]["LR"] == 1e-6


@pytest.mark.parametrize(
    ("weights", "folder"),
    [
        ("other/checkpoint-best", "other/test"),
        ("other/checkpoint-3/", "other/test-checkpoint-3"),
        ("other/checkpoint-3/model.pth", "other/test-checkpoint-3"),
        ("bought.model", "test-bought.model"),
    ],
)
def test_results_stand_beside_the_weights_that_are_given_under_their_name(tmp_path, monkeypatch, weights, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "other" / "checkpoint-3" / "manifest.json").touch()
    assert parse_test_args(["--ckpt", weights]).output_dir == str(tmp_path / folder)
    assert parse_test_args(["--ckpt", weights, "--result-path", "mine"]).output_dir == "mine"
