"""Whatever a user can get wrong with VL-BERT: exit code 2, one line that names it, nothing overwritten."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from data.vlbert_files import REGION_ROOT, region_folder
from tests.scripts.bad_inputs import BadInputs, failure
from tests.scripts.vlbert_run import drawn_regions, predict, predict_flags, program, run_dir, train_flags, trained_run
from tests.scripts.vqa_run import tree

BOXES = region_folder("train2014", "10-100ada")


class Case:
    """Private copies of the data and of a trained run, whose files nothing may change."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.data = tmp_path / "data"
        shutil.copytree(drawn_regions(), self.data)
        self.boxes = self.data / REGION_ROOT / BOXES
        self.models = tmp_path / "models"
        self.run = run_dir(self.models, "standard")
        shutil.copytree(trained_run(), self.run)
        self.test = False

    def train(self, *more: object, strategy: str = "standard") -> list[str]:
        return train_flags(self.tmp / "new", *more, strategy=strategy, data=self.data)

    def predict(self, *more: object, strategy: str = "standard") -> list[str]:
        self.test = True
        flags = ("--ckpt", self.run / "checkpoint-best", "--result-path", self.run / "test", *more)
        return predict_flags(self.models, *flags, strategy=strategy, data=self.data)

    def box_file(self, **values: object) -> list[str]:
        """Spoil the box file of the first training image."""
        path = self.boxes / "1.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return self.train("--limit_samples", "10", "--no_validation")

    def config(self, text: str) -> list[str]:
        path = self.tmp / "own.yaml"
        path.write_text(text)
        return [str(path), str(self.tmp / "new"), "--device", "cpu"]


# every box file is read when its sample is due, not before
FOUND_AT_A_SAMPLE = ("features_of_a_wrong_width", "an_image_without_boxes", "an_image_of_no_size")
BAD = BadInputs()
bad = BAD.register


@bad(r"own.yaml: unknown key 'TRAIN.BATCH_IMAGE': did you mean TRAIN.BATCH_IMAGES\?")
def an_unknown_key_of_the_config(case):
    return case.config("TRAIN:\n  BATCH_IMAGE: 3\n")


@bad(r"own.yaml:\d: not YAML \(expected")
def a_config_that_is_no_yaml(case):
    return case.config("TRAIN:\n  - a\n b: [\n")


@bad(r"own.yaml must hold settings, KEY: value a line")
def a_config_without_keys(case):
    return case.config("- just\n- a list\n")


@bad(r"own.yaml: TRAIN must hold settings, got 3")
def a_section_that_is_a_number(case):
    return case.config("TRAIN: 3\n")


@bad(r"own.yaml: RNG_SEED must be a whole number below 2\*\*63, got 9{23}")
def a_seed_that_no_generator_takes(case):
    return case.config(f"RNG_SEED: {'9' * 23}\n")


@bad(r"own.yaml: TRAIN.LR must be a number, got 'fast'")
def a_rate_that_is_a_word(case):
    return case.config("TRAIN:\n  LR: fast\n")


@bad(r"own.yaml: DATASET.USE_IMDB must be False \(nothing else is implemented\), got True")
def a_setting_that_is_not_implemented(case):
    return case.config("DATASET:\n  USE_IMDB: true\n")


@bad(r"own.yaml: EXTENDS names other.yaml, which is not beside it")
def a_base_that_is_not_there(case):
    return case.config("EXTENDS: other.yaml\n")


@bad(r"own.yaml: EXTENDS must be the name of a file beside it, got '\.\./\.\./etc/passwd'")
def a_base_elsewhere(case):
    return case.config("EXTENDS: ../../etc/passwd\n")


@bad(r"EXTENDS leads in a circle")
def a_config_that_extends_itself(case):
    return case.config("EXTENDS: own.yaml\n")


@bad(r"own.yaml:1: not YAML \(could not determine a constructor for the tag")
def a_config_that_would_run_a_program(case):
    return case.config("TRAIN: !!python/object/apply:os.system ['touch spoilt']\n")


@bad(r"no config file cfgs/vqa/none.yaml, neither as given nor in scripts/")
def a_config_that_is_not_there(case):
    return ["cfgs/vqa/none.yaml", str(case.tmp / "new")]


@bad(r"--set TRAIN.END_EPOCH must be of the form|'TRAIN.END_EPOCH' must be of the form SECTION.KEY=value")
def an_override_without_a_value(case):
    return case.train("--set=TRAIN.END_EPOCH")


@bad(r"--strategy must be .*last_<k>, got 'spot'")
def an_unknown_strategy(case):
    return case.train(strategy="spot")


@bad(r"strategy last_9: the encoder has 3 layers, train 1 to 3 of them")
def more_trainable_layers_than_there_are(case):
    return case.train(strategy="last_9")


@bad(r"strategy specific_k freezes the listed layers, from 0 to 2: there is no layer 7")
def a_frozen_layer_that_is_not_there(case):
    return case.train("--set=NETWORK.VLBERT.FROZEN_LAYERS=[1, 7]", strategy="specific_k")


@bad(r"strategy specific_k freezes the listed layers, from 0 to 2: got \[\]")
def no_layer_to_freeze(case):
    return case.train("--set=NETWORK.VLBERT.FROZEN_LAYERS=[]", strategy="specific_k")


@bad(r"POLICY.OUTPUT_SIZE is 180, SpotTune of this network takes 360: write that, or leave the key out")
def a_policy_of_another_size(case):
    return case.config("FINETUNE_STRATEGY: SpotTune\nPOLICY:\n  OUTPUT_SIZE: 180\n")


@bad(r"NETWORK.VLBERT: hidden_size 16 is not a multiple of num_attention_heads 3")
def heads_that_do_not_divide_the_width(case):
    return case.train("--set=NETWORK.VLBERT.num_attention_heads=3")


@bad(r"NETWORK.IMAGE_FINAL_DIM 768 and NETWORK.VLBERT.visual_size 16 must be equal")
def two_widths_of_a_region(case):
    return case.train("--set=NETWORK.IMAGE_FINAL_DIM=768")


@bad(r"1 of \d+ images of train2014 have no box file, the first: 4; see docs/datasets.md")
def an_image_without_its_box_file(case):
    (case.boxes / "4.json").unlink()
    return case.train()


@bad(r"1 of \d+ images of train2014 have no size, the first: 4")
def an_image_that_cocos_file_does_not_know(case):
    path = case.data / "annotations" / "instances_train2014.json"
    content = json.loads(path.read_text())
    content["images"] = [image for image in content["images"] if image["id"] != 4]
    path.write_text(json.dumps(content))
    return case.train()


@bad(r"1.json: features has \d+ bytes, \d x 2048 float32 numbers have \d+")
def features_of_a_wrong_width(case):
    content = json.loads((case.boxes / "1.json").read_text())
    return case.box_file(features=content["features"][: len(content["features"]) // 8 * 4])


@bad(r"sample \d+ \(question 100\d\): .*1.json: num_boxes must be a whole number above 0, got 0")
def an_image_without_boxes(case):
    return case.box_file(num_boxes=0)


@bad(r"1.json: image_w and image_h must be whole numbers above 0")
def an_image_of_no_size(case):
    return case.box_file(image_w=0)


@bad(r"answers.txt has 3 answers, ANSWER_VOCAB_SIZE says 3129: make them equal")
def an_answer_file_of_another_length(case):
    (case.tmp / "answers.txt").write_text("<unk>\nyes\nno\n")
    answers = f"--set=DATASET.ANSWER_VOCAB_FILE={case.tmp}/answers.txt"
    flags = case.train(answers, "--set=DATASET.ANSWER_VOCAB_SIZE=3129")
    at = flags.index("--build_answers")
    return flags[:at] + flags[at + 2 :]


@bad(r"answers.txt has no <unk>")
def an_answer_file_without_the_unknown_answer(case):
    (case.tmp / "answers.txt").write_text("yes\nno\n")
    flags = case.train(f"--set=DATASET.ANSWER_VOCAB_FILE={case.tmp}/answers.txt")
    at = flags.index("--build_answers")
    return flags[:at] + flags[at + 2 :]


@bad(r"no answer list: give DATASET.ANSWER_VOCAB_FILE, or --build_answers 9")
def no_answers_at_all(case):
    flags = case.train()
    at = flags.index("--build_answers")
    return flags[:at] + flags[at + 2 :]


@bad(
    r"no such file: .*v2_OpenEnded_mscoco_train2014_questions.json: give the folder above vqa/ as DATASET.DATASET_PATH"
)
def data_that_are_not_there(case):
    shutil.rmtree(case.data / "vqa")
    return case.train()


@bad(r"image set 'train' of vqa: choose train2014, val2014")
def an_image_set_of_the_other_data_set(case):
    return case.train("--set=DATASET.TRAIN_IMAGE_SET=train")


@bad(r"1 question ids missing")
def an_annotation_that_is_missing(case):
    path = case.data / "vqa" / "v2_mscoco_train2014_annotations.json"
    content = json.loads(path.read_text())
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    return case.train()


@bad(r"no archive at .*trainval2014_resnet101_faster_rcnn_genome.zip")
def a_zip_archive_that_is_not_there(case):
    return case.train("--set=DATASET.ZIP_MODE=true")


@bad(r"genome.zip is no sound zip archive")
def a_zip_archive_that_is_cut_off(case):
    (case.data / REGION_ROOT / f"{BOXES}.zip").write_bytes(b"PK\x03\x04rest")
    return case.train("--set=DATASET.ZIP_MODE=true")


@bad(r"DATASET.BOXES must be '36' or '10-100ada', got '50'")
def boxes_of_another_kind(case):
    return case.train("--set=DATASET.BOXES='50'")


@bad(r"no vocabulary at .*vocab.txt")
def a_bert_folder_without_words(case):
    (case.data / "bert_drawn" / "vocab.txt").unlink()
    return case.train()


@bad(r"no such file: .*v2_mscoco_val2014_annotations.json: give the folder above vqa/")
def validation_without_its_annotations(case):
    (case.data / "vqa" / "v2_mscoco_val2014_annotations.json").unlink()
    return case.train()


@bad(r"no folder of box files at .*genome: see docs/datasets.md")
def box_files_that_are_not_there(case):
    shutil.rmtree(case.boxes)
    return case.train()


@bad(r"no answer list at none.txt: give DATASET.ANSWER_VOCAB_FILE")
def an_answer_file_that_is_not_there(case):
    flags = case.train("--set=DATASET.ANSWER_VOCAB_FILE=none.txt")
    at = flags.index("--build_answers")
    return flags[:at] + flags[at + 2 :]


@bad(r'ANSWER_VOCAB_FILE must be a text \(write "" for an empty text, .* in a shell\), got None')
def a_text_that_is_left_out(case):
    return case.train("--set=DATASET.ANSWER_VOCAB_FILE=")


@bad(r"no weights at none-0000.model \(NETWORK.IMAGE_PRETRAINED is the beginning of its name\)")
def a_resnet_that_is_not_there(case):
    flags = case.train("--set=NETWORK.IMAGE_FEAT_PRECOMPUTED=false", "--set=NETWORK.IMAGE_PRETRAINED=none")
    flags.remove("--from_scratch")
    return flags


@bad(r"no such file: none.jsonl: give a .jsonl file of your questions")
def own_questions_that_are_not_there(case):
    return case.train("--train_file", "none.jsonl", "--no_validation", "--regions", case.boxes)


@bad(r"no such file: none.jsonl: give a .jsonl file of your questions")
def own_questions_to_predict_that_are_not_there(case):
    return case.predict("--split", "none.jsonl", "--regions", case.boxes)


@bad(r"regions of your own images: give them as --regions FOLDER")
def own_questions_to_predict_without_regions(case):
    (case.tmp / "own.jsonl").write_text('{"image": "1.jpg", "question": "red?"}\n')
    return case.predict("--split", case.tmp / "own.jsonl")


@bad(r"no such file: none.json: give the file as --annotations")
def annotations_that_are_not_there(case):
    return case.predict("--annotations", "none.json")


MISSING_FILES = (
    *("data_that_are_not_there", "validation_without_its_annotations", "box_files_that_are_not_there"),
    *("an_answer_file_that_is_not_there", "a_bert_folder_without_words", "no_weights_to_begin_from"),
)


@bad(r"vocab.txt has \d+ words, the network 20 \(VLBERT.vocab_size\)")
def more_words_than_rows(case):
    return case.train("--set=NETWORK.VLBERT.vocab_size=20")


@bad(r"no weights at .*pytorch_model.bin \(NETWORK.BERT_MODEL_NAME is its folder\): fetch them, or start from random")
def no_weights_to_begin_from(case):
    flags = case.train()
    flags.remove("--from_scratch")
    return flags


@bad(r"no weights at none.model \(--partial-pretrain or NETWORK.PARTIAL_PRETRAIN\): fetch them, or start from random")
def pretrained_weights_that_are_not_there(case):
    flags = case.train("--partial-pretrain", "none.model")
    flags.remove("--from_scratch")
    return flags


@bad(r"other.model: none of the 1 weights, such as x, is VL-BERT's: give a VL-BERT file")
def weights_of_something_else(case):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, case.tmp / "other.model")
    flags = case.train("--partial-pretrain", case.tmp / "other.model")
    flags.remove("--from_scratch")
    return flags


@bad(r"the image path begins with a trained ResNet, nothing is downloaded")
def an_image_path_without_its_resnet(case):
    flags = case.train("--set=NETWORK.IMAGE_FEAT_PRECOMPUTED=false")
    flags.remove("--from_scratch")
    return flags


@bad(r"--train_file without --val_file: give your validation questions, or --no_validation")
def own_questions_without_validation(case):
    return case.train("--train_file", "own.jsonl", "--regions", case.boxes)


@bad(r"--train_file needs --regions")
def own_questions_without_regions(case):
    return case.train("--train_file", "own.jsonl", "--no_validation")


@bad(r"POLICY.OPTIMIZER SGD beside TRAIN.OPTIMIZER AdamW")
def two_optimizers(case):
    return case.train("--set=POLICY.OPTIMIZER=SGD", strategy="BlockDrop")


@bad(r"TRAIN.LR_STEP 'two' must be epochs joined by commas")
def epochs_that_are_no_numbers(case):
    return case.train("--set=TRAIN.LR_SCHEDULE=step", "--set=TRAIN.LR_STEP=two")


@bad(r"60 training questions do not fill one step of 2000 \(TRAIN.BATCH_IMAGES 1000 x TRAIN.GRAD_ACCUMULATE_STEPS 2")
def a_batch_larger_than_the_data(case):
    return case.train("--set=TRAIN.BATCH_IMAGES=1000")


@bad(r"--model-dir is given twice, once without its name: give it once")
def a_folder_that_is_given_twice(case):
    return case.train("--model-dir", "elsewhere")


@bad(r"float16 needs a CUDA device")
def half_precision_on_the_cpu(case):
    return case.train("--amp", "fp16")


@bad(r"--no_auto_resume: .* holds checkpoint-0 of another run")
def a_folder_of_another_run(case):
    return train_flags(case.models, "--no_auto_resume", data=case.data)


@bad(r"checkpoint-0 was made with NETWORK.VLBERT.num_hidden_layers 3, not 2: give the settings of that run")
def a_checkpoint_of_another_size(case):
    return train_flags(case.models, "--set=NETWORK.VLBERT.num_hidden_layers=2", data=case.data)


@bad(r"--reference_adamw goes with TRAIN.OPTIMIZER AdamW, not SGD")
def the_arithmetic_of_another_optimizer(case):
    return case.train("--reference_adamw", "--set=TRAIN.OPTIMIZER=SGD")


@bad(r"--from_scratch takes no weights and --partial-pretrain gives some: leave one of them out")
def weights_for_a_start_without_weights(case):
    return case.train("--partial-pretrain", "nowhere")


@bad(r"checkpoint-0 was trained with another answers_vqa.txt \(18 entries there, \d+ here\): give the same data")
def a_run_that_goes_on_with_another_answer_list(case):
    return train_flags(case.models, "--build_answers", 2, data=case.data)


@bad(r"CONSTRAIN_K_NUM_BLOCKS 40 is more than the 3 decisions of BlockDrop: give 0 to 3")
def more_blocks_than_there_are(case):
    more = ("--set=USE_CONSTRAIN_K_LOSS=true", "--set=CONSTRAIN_K_NUM_BLOCKS=40")
    return case.train(*more, strategy="BlockDrop")


@bad(r"--build_answers: the training questions have no answers; give a set that has some")
def a_training_set_without_answers(case):
    return case.train("--set=DATASET.TRAIN_IMAGE_SET=test2015")


@bad(r"TRAIN.RESUME goes on from the checkpoint of epoch BEGIN_EPOCH - 1: set TRAIN.BEGIN_EPOCH to 1 or more")
def a_resume_before_the_first_epoch(case):
    return case.train("--set=TRAIN.RESUME=true")


@bad(r"--do-test does not go with --enable_deepspeed")
def a_test_after_deepspeed(case):
    return case.train("--do-test", "--enable_deepspeed")


@bad(r"no checkpoint at .*none: give one as --ckpt, or train with this config first")
def a_checkpoint_that_is_not_there(case):
    return case.predict("--ckpt", case.tmp / "none")


@bad(r"checkpoint-best was made with FINETUNE_STRATEGY standard, not BlockDrop: give the settings of that run")
def a_strategy_that_the_checkpoint_was_not_trained_with(case):
    return case.predict(strategy="BlockDrop")


@bad(r"checkpoint-best was made with REFERENCE_BEHAVIOUR False, not True")
def another_arithmetic_than_that_of_the_training(case):
    weights = trained_run("SpotTune") / "checkpoint-best"
    return case.predict("--ckpt", weights, "--reference_behaviour", strategy="SpotTune")


@bad(r"was made with NETWORK.NO_GROUNDING False, not True")
def a_run_that_goes_on_as_another_model_of_the_same_shapes(case):
    return train_flags(case.models, "--set=NETWORK.NO_GROUNDING=true", data=case.data)


@bad(r"weights.pth has no policy: it is no checkpoint of a run with this strategy, see --strategy")
def weights_without_a_policy(case):
    shutil.copy(trained_run() / "checkpoint-best" / "model.pth", case.tmp / "weights.pth")
    answers = trained_run() / "checkpoint-best" / "answers_vqa.txt"
    more = ("--ckpt", case.tmp / "weights.pth", f"--set=DATASET.ANSWER_VOCAB_FILE={answers}")
    return case.predict(*more, strategy="BlockDrop")


@bad(r"--zero_stage 3 does not go with SpotTune: the processes run different layers; take stage 2")
def a_policy_with_divided_weights(case):
    return case.train("--enable_deepspeed", "--zero_stage", 3, strategy="SpotTune")


@bad(r"--do-test predicts TEST_IMAGE_SET with the best checkpoint: leave --train_file and --no_validation out")
def a_test_without_a_best_checkpoint(case):
    return case.train("--do-test", "--no_validation")


@bad(r"image set 'test2019' of vqa: choose")
def a_test_of_an_image_set_that_is_not_there(case):
    return case.train("--do-test", "--set=DATASET.TEST_IMAGE_SET=test2019")


@bad(r"DATASET.VAL_IMAGE_SET test-dev2015: no question has an answer of the answer list: give a set with answers")
def a_validation_without_answers(case):
    return case.train("--set=DATASET.VAL_IMAGE_SET=test-dev2015")


@bad(r"answers.txt is not UTF-8 text: save it as UTF-8")
def answers_in_another_encoding(case):
    (case.tmp / "answers.txt").write_bytes("<unk>\ncaf\xe9\n".encode("latin-1"))
    flags = case.train(f"--set=DATASET.ANSWER_VOCAB_FILE={case.tmp}/answers.txt")
    at = flags.index("--build_answers")
    return flags[:at] + flags[at + 2 :]


@bad(r"kitchen/1.jpg and garden/1.jpg both end in 1, by which their regions are found")
def two_images_of_one_number(case):
    rows = [{"image": f"{room}/1.jpg", "question": "red?", "answers": ["red"]} for room in ("kitchen", "garden")]
    (case.tmp / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--no_validation", "--regions", case.boxes, "--build_answers", 1)
    return case.train("--train_file", case.tmp / "own.jsonl", *more)


@bad(r"the checkpoint does not fit the model")
def a_checkpoint_with_frozen_copies_as_a_plain_one(case):
    shutil.copy(trained_run("SpotTune") / "checkpoint-best" / "model.pth", case.tmp / "weights.pth")
    answers = trained_run() / "checkpoint-best" / "answers_vqa.txt"
    return case.predict("--ckpt", case.tmp / "weights.pth", f"--set=DATASET.ANSWER_VOCAB_FILE={answers}")


@bad(r"it looks like a pre-trained file, not a fine-tuned one")
def a_pretrained_file_to_predict_with(case):
    state = torch.load(trained_run() / "checkpoint-best" / "model.pth", weights_only=True)["model"]
    kept = {name: value for name, value in state.items() if not name.startswith("final_mlp.2")}
    torch.save({"state_dict": kept}, case.tmp / "pre.model")
    answers = trained_run() / "checkpoint-best" / "answers_vqa.txt"
    return case.predict("--ckpt", case.tmp / "pre.model", f"--set=DATASET.ANSWER_VOCAB_FILE={answers}")


@bad(r"a global decision needs the counts of a training epoch")
def a_global_decision_without_counts(case):
    state = torch.load(trained_run("BlockDrop") / "checkpoint-best" / "model.pth", weights_only=True)["model"]
    kept = {name: value for name, value in state.items() if not name.startswith("policy_")}
    torch.save({"model": kept}, case.tmp / "without.pth")
    answers = trained_run("BlockDrop") / "checkpoint-best" / "answers_vqa.txt"
    more = (f"--set=DATASET.ANSWER_VOCAB_FILE={answers}", "--set=POLICY_GLOBAL_DECISION=true")
    return case.predict("--ckpt", case.tmp / "without.pth", *more, strategy="BlockDrop")


@bad(r"image set 'test2019' of vqa: choose")
def a_split_that_does_not_exist(case):
    return case.predict("--split", "test2019")


@bad(r"annotates 0 of the 72 questions to be evaluated")
def annotations_of_another_split(case):
    annotations = case.data / "vqa" / "v2_mscoco_val2014_annotations.json"
    return case.predict("--annotations", annotations)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_and_changes_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = Case(tmp_path)
    spoil, message = BAD[name]
    argv = spoil(case)
    watched = [case.data, case.models]
    before = tree(*watched)
    code, line = failure(capsys, argv, predict if case.test else program)
    assert re.search(message, line), line
    assert code == 2
    assert tree(*watched) == before
    left = {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert left <= ({"run.json"} if name in FOUND_AT_A_SAMPLE else set())
    assert not (tmp_path / "spoilt").exists()
    assert name not in MISSING_FILES or not (tmp_path / "new").exists()
