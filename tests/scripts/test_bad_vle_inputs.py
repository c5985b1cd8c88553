"""Whatever a user can get wrong with VLE: exit code 2, one line that names it, nothing overwritten."""

import json
import re
from pathlib import Path

import pytest
import torch

from scripts import convert_checkpoint_after_ft, write_vqa
from tests.scripts.bad_inputs import BadInputs, failure
from tests.scripts.vle_run import copy_of, drawn_rows, eval_flags, program, train_flags, trained_run
from tests.scripts.vqa_run import drawn_data, tree


class Case:
    """Private copies of the rows and of a trained model folder, and an output folder that holds an older result."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.rows = copy_of(drawn_rows(), tmp_path / "rows")
        self.model = copy_of(trained_run() / "checkpoint-best", tmp_path / "model")
        self.output = tmp_path / "output"
        self.output.mkdir()
        (self.output / "submit_vqav2_test.json").write_text("[]\n")

    def train(self, *more: object) -> list[str]:
        argv = train_flags(self.output, "--max_steps", "1", *more, model=self.model, rows=self.rows)
        return [flag for flag in argv if flag != "--from_scratch"]

    def evaluate(self, *more: object) -> list[str]:
        return eval_flags(self.model, self.output, *more, rows=self.rows)

    def change(self, name: str, **values: object) -> None:
        """Set keys of the model's config.json, or of one of its sections by ``section__key``."""
        path = self.model / name
        content = json.loads(path.read_text())
        for key, value in values.items():
            *section, key = key.split("__")
            (content[section[0]] if section else content)[key] = value
        path.write_text(json.dumps(content))

    def row(self, split: str, **values: object) -> None:
        """Set keys of the first row of a split."""
        path = self.rows / f"vqav2_{split}.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | values), *others]) + "\n")

    def config(self, **values: object) -> list[str]:
        path = self.tmp / "config.json"
        path.write_text(json.dumps(values))
        return self.train("--train_config_file", path)


BAD = BadInputs()
bad = BAD.register


@bad(r"unknown key 'learnig_rate': did you mean learning_rate\?")
def an_unknown_key_of_the_config(case):
    return case.config(learnig_rate=1)


@bad(r"config.json: precision must be 16, 32 or \"bf16\", got 8")
def a_precision_that_does_not_exist(case):
    return case.config(precision=8)


@bad(r"precision 16 needs a CUDA device: on the CPU give --precision 32 or --precision bf16")
def half_precision_on_the_cpu(case):
    return case.train("--precision", "16")


@bad(r"--train_config_file absent.json: no such file here or in")
def no_config_file(case):
    return case.train("--train_config_file", "absent.json")


@bad(r"val_check_interval 0.5 is not implemented: it must be 1.0")
def validation_within_an_epoch(case):
    return case.config(val_check_interval=0.5)


@bad(r"warmup_steps 1.5 is a fraction above 1")
def a_warm_up_of_more_than_everything(case):
    return case.train("--warmup_steps", "1.5")


@bad(r"no folder hfl/vle-base: give --model_dir")
def a_model_that_would_have_to_be_downloaded(case):
    return [*case.train(), "--model_dir", "hfl/vle-base"]


@bad(r"no sentencepiece model at .*spm.model")
def no_tokenizer(case):
    (case.model / "spm.model").unlink()
    return case.train()


@bad(r"spm.model begins with \('<unk>', '<s>', '</s>'.*DeBERTa's layout needs")
def the_tokenizer_of_another_family(case):
    (case.model / "spm.model").write_bytes((drawn_data() / "beit3.spm").read_bytes())
    return case.train()


@bad(r"no such file: .*config.json: give the folder of a VLE model as --model_dir")
def no_model_config(case):
    (case.model / "config.json").unlink()
    return case.train()


@bad(r"share_att_key False is not implemented here, only True")
def an_option_that_is_not_implemented(case):
    case.change("config.json", text_config__share_att_key=False)
    return case.train()


@bad(r"model_type 'bert' is not implemented here, only 'deberta-v2'")
def another_text_tower(case):
    case.change("config.json", text_config__model_type="bert")
    return case.train()


@bad(r"id2label has 2 entries but none for 1")
def labels_with_a_hole(case):
    case.change("config.json", id2label={"0": "yes", "2": "no"})
    return case.evaluate()


@bad(r"was trained on another answer list \(\d+ answers there, 2 here\)")
def fewer_labels_than_the_head_has_rows(case):
    case.change("config.json", id2label=["yes", "no"])
    return case.evaluate()


@bad(r"holds no weights: looked for")
def no_weights(case):
    (case.model / "model.pth").unlink()
    return case.train()


@bad(r"missing from the file.*text_model.encoder.rel_embeddings.weight|not a VLE checkpoint")
def weights_of_another_model(case):
    torch.save({"model": {"beit3.text_embed.weight": torch.zeros(2, 2)}}, case.model / "model.pth")
    return case.train()


@bad(r"no vqav2_train.jsonl \(or .arrow\) in .*: run python scripts/write_vqa.py first")
def no_rows(case):
    (case.rows / "vqav2_train.jsonl").unlink()
    return case.train()


@bad(r"vqav2_train.jsonl: the last line is cut off: run python scripts/write_vqa.py again")
def rows_that_are_half_written(case):
    path = case.rows / "vqav2_train.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    return case.train()


@bad(r"vqav2_train.arrow is not a whole Arrow file .*: run python scripts/write_vqa.py again with --format arrow")
def an_arrow_file_that_is_half_written(case):
    pytest.importorskip("pyarrow")
    places = ["--data_path", str(drawn_data()), "--output_path", str(case.tmp / "arrow"), "--format", "arrow"]
    write_vqa.main([*places, "--num_rest_val_images", "12", "--min_answer_count", "5"])
    content = (case.tmp / "arrow" / "vqav2_train.arrow").read_bytes()
    (case.rows / "vqav2_train.jsonl").unlink()
    (case.rows / "vqav2_train.arrow").write_bytes(content[: len(content) // 2])
    return case.train()


@bad(r"vqav2_train.jsonl:1: label 999 is outside of the \d+ answers of label2answer.json")
def a_label_beyond_the_answer_list(case):
    case.row("train", questions=["what?"], question_id=[1], answer_labels=[[999]], answer_scores=[[1.0]])
    return case.train()


@bad(r"vqav2_train.jsonl:1: 2 questions, but 1 question_id")
def questions_without_an_id(case):
    case.row("train", questions=["what?", "who?"], question_id=[1], answer_labels=[], answer_scores=[])
    return case.train()


@bad(r"'../secret.jpg' contains '..'; paths in data files must stay inside the data folder")
def an_image_outside_of_the_data_folder(case):
    case.row("train", image="../secret.jpg")
    return case.train()


@bad(r"1 of \d+ images are not in .*, the first: train2014/absent.jpg")
def an_image_that_is_not_there(case):
    case.row("train", image="train2014/absent.jpg")
    return case.train()


@bad(r"no label2answer.json in .*: run python scripts/write_vqa.py first")
def no_answer_list(case):
    (case.rows / "label2answer.json").unlink()
    return case.train()


@bad(r"the labels in .* belong to its label2answer.json, another answer list than the model's")
def an_evaluation_with_labels_of_another_list(case):
    path = case.rows / "label2answer.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    return case.evaluate("--eval_split", "val")


@bad(r"--eval_split tset: choose train, val, val2014, test, test-dev, or a .jsonl file of your own")
def a_misspelt_split(case):
    return case.evaluate("--eval_split", "tset")


@bad(r"image_size 8 is smaller than a patch of 16 pixels")
def images_smaller_than_a_patch(case):
    return case.train("--image_size", "8")


@bad(r"preprocessor_config.json: do_resize False is not implemented here")
def images_that_are_not_to_be_resized(case):
    case.change("preprocessor_config.json", do_resize=False)
    return case.train()


@bad(r"--reference_adamw goes with optim_type adamw, not sgd")
def the_arithmetic_of_one_optimizer_for_another(case):
    return case.train("--reference_adamw", "--optim_type", "sgd")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_overwrites_nothing(name, tmp_path, capsys):
    spoil, message = BAD[name]
    case = Case(tmp_path)
    argv = spoil(case)
    before = tree(case.output, case.rows, case.model)
    code, line = failure(capsys, argv, program)
    assert code == 2, line
    assert re.search(message, line), line
    assert tree(case.output, case.rows, case.model) == before


def test_answers_as_a_list_in_the_config_are_fine(tmp_path, capsys):
    case = Case(tmp_path)
    labels = json.loads((case.model / "config.json").read_text())["id2label"]
    case.change("config.json", id2label=[labels[str(number)] for number in range(len(labels))])

    program(*case.evaluate("--limit_samples", "3"))
    assert len(json.loads((case.output / "submit_vqav2_test.json").read_text())) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{tmp}/absent.ckpt"], r"no checkpoint at .*absent.ckpt"),
        (["{tmp}/model", "{tmp}/model/spm.bin", "--model_dir", "{tmp}/absent"], r"no such file: .*config.json"),
        (["{tmp}/model/model.pth", "{tmp}/new"], r"has no config.json beside it: give --model_dir"),
        (["{tmp}/other.pth", "{tmp}/new.bin"], r"not a VLE checkpoint: none of its 1 names, such as x"),
        (["{tmp}/model", "{tmp}/other.pth"], r"other.pth exists: give another output, or --overwrite"),
    ],
)
def test_conversions_that_cannot_work_write_nothing(argv, message, tmp_path, capsys):
    Case(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    before = tree(tmp_path)
    code, line = failure(
        capsys,
        [argument.format(tmp=tmp_path) for argument in argv],
        lambda *arguments: convert_checkpoint_after_ft.main(list(arguments)),
    )
    assert code == 2, line
    assert re.search(message, line), line
    assert tree(tmp_path) == before
