"""Whatever a user can get wrong with captions: exit code 2, one line that names it, nothing overwritten."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data.metrics import java_metrics
from tests.scripts.bad_inputs import BadInputs
from tests.scripts.caption_run import NUM_VAL, caption_data, eval_flags, train_flags, trained_captioner
from tests.scripts.vqa_run import failure, program, trained_checkpoint, tree


class Case:
    """A private copy of the data, and an output folder that holds an older result."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.data = Path(shutil.copytree(caption_data(), tmp_path / "data"))
        self.output = tmp_path / "output"
        self.output.mkdir()
        (self.output / "submit_coco_captioning_test.json").write_text("[]\n")
        self.weights = trained_captioner() / "checkpoint-best"

    def train(self, *more: object) -> list[str]:
        return train_flags(self.output, "--max_steps", "1", *more, data=self.data)

    def evaluate(self, *more: object, task: str = "coco_captioning") -> list[str]:
        return eval_flags(self.weights, self.output, *more, task=task, data=self.data)

    def file(self, name: str, *rows: object) -> Path:
        path = self.tmp / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def edit(self, name: str, change: Callable[[list[dict]], None]) -> None:
        """Change the rows of an index file."""
        path = self.data / name
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TRAIN, VAL, TEST = (f"coco_captioning.{split}.jsonl" for split in ("train", "val", "test"))
IMAGE = {"image": "val2014/absent.jpg"}
BAD = BadInputs()
bad = BAD.register


@bad(r"coco_captioning.train.jsonl.*run scripts/make_index.py coco_captioning --data_path DIR first")
def no_index(case):
    (case.data / TRAIN).unlink()
    return case.train()


@bad(r"coco_captioning.train.jsonl:2: text_segment must be a list of ids of at least 0 and below \d+.*got \[99999\]")
def a_word_that_the_tokenizer_does_not_have(case):
    case.edit(TRAIN, lambda rows: rows[1].update(text_segment=[99999]))
    return case.train()


@bad(r"coco_captioning.train.jsonl:1: text_segment must be a list of ids.*got \[\]")
def an_empty_caption(case):
    case.edit(TRAIN, lambda rows: rows[0].update(text_segment=[]))
    return case.train()


@bad(r"the index coco_captioning.\*.jsonl in .* was made with another sentencepiece model")
def an_index_of_another_tokenizer(case):
    (case.data / "coco_captioning.tokenizer.json").write_text('{"sha256": "other"}\n')
    return case.train()


@bad(r"coco_captioning.test.jsonl:2: image \d+ stands on line 1 already")
def an_image_that_stands_twice(case):
    case.edit(TEST, lambda rows: rows.insert(1, rows[0]))
    return case.evaluate()


@bad(r"1 of 9 images are not in .*, the first: val2014/absent.jpg; check --data_path")
def an_image_that_is_not_there(case):
    case.edit(TEST, lambda rows: rows[0].update(image_path="val2014/absent.jpg"))
    return case.evaluate()


@bad(r"nocaps_val_4500_captions.json has no captions of 9 of the 9 images to be captioned, such as \d+")
def reference_captions_of_another_set(case):
    return case.evaluate("--annotations", case.data / "nocaps_val_4500_captions.json")


@bad(r"nocaps_val_4500_captions.json has no captions of 1 of the 5 images to be captioned, such as 77: give the --ann")
def an_image_of_nocaps_that_the_annotations_do_not_know(case):
    case.edit("nocaps.val.jsonl", lambda rows: rows[0].update(image_id=77))
    return case.evaluate("--eval_split", "val", task="nocaps")


@bad(r"nocaps_test_image_info.json has no captions, only a list of images")
def a_list_of_images_as_reference_captions(case):
    return case.evaluate("--annotations", case.data / "nocaps_test_image_info.json")


@bad(r"dataset_coco.json has no captions of split val: give")
def an_official_file_without_the_split(case):
    path = case.data / "dataset_coco.json"
    path.write_text(path.read_text().replace('"split": "val"', '"split": "other"'))
    return case.train()


@bad(rf"dataset_coco.json has no captions of 1 of the {NUM_VAL} images to be captioned")
def an_official_file_that_lacks_an_image_is_noticed_before_training(case):
    path = case.data / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"].remove(next(image for image in content["images"] if image["split"] == "val"))
    path.write_text(json.dumps(content))
    return case.train()


@bad(r"no such file: .*absent.json")
def annotations_that_are_not_there(case):
    return case.evaluate("--annotations", case.tmp / "absent.json")


@bad(r"METEOR needs the package pycocoevalcap: pip install pycocoevalcap, or leave out --caption_metrics all")
def metrics_that_need_java_where_there_is_none(case):
    return case.evaluate("--caption_metrics", "all")


@bad(r"--eval_split tset: choose val, test, a .jsonl file of your own, or a folder of images")
def a_misspelt_split(case):
    return case.evaluate("--eval_split", "tset")


@bad(r"no image in .*: it needs files that end in .bmp")
def a_folder_without_images(case):
    (case.tmp / "empty").mkdir()
    argv = case.evaluate("--eval_split", case.tmp / "empty")
    place = argv.index("--data_path")
    return argv[:place] + argv[place + 2 :]


@bad(r"is a folder of images: leave --data_path out, or give the same folder")
def a_folder_of_images_beside_a_data_path(case):
    return case.evaluate("--eval_split", case.data / "val2014")


@bad(r"own.jsonl:1: unknown key 'answers'; a line is .*captions")
def own_questions_instead_of_captions(case):
    return case.train("--train_file", case.file("own.jsonl", IMAGE | {"question": "what?", "answers": ["x"]}))


@bad(r'own.jsonl: no line has "captions": training needs them')
def own_images_without_captions_to_train_on(case):
    return case.train("--train_file", case.file("own.jsonl", IMAGE))


@bad(r'own.jsonl:1: "captions" must be a list of texts that are not empty')
def an_own_caption_that_is_empty(case):
    return case.train("--train_file", case.file("own.jsonl", IMAGE | {"captions": ["a", " "]}))


@bad(r"own.jsonl:2: image val2014/absent.jpg stands on line 1 already")
def an_own_image_that_stands_twice(case):
    return case.evaluate("--eval_split", case.file("own.jsonl", IMAGE, IMAGE))


@bad(r"checkpoint-step2: .*mlm_head")
def weights_of_the_question_answering_model(case):
    case.weights = trained_checkpoint()
    return case.evaluate()


@bad(r"argument --num_beams: must be at least 1, got 0")
def no_beams(case):
    return case.evaluate("--num_beams", "0")


@bad(r"argument --length_penalty: must be at least 0, got -1")
def a_negative_length_penalty(case):
    return case.evaluate("--length_penalty", "-1")


@bad(r"argument --top_p: must be above 0")
def an_empty_nucleus(case):
    return case.evaluate("--top_p", "0")


@bad(r"argument --captioning_mask_prob: must be .*1")
def more_words_masked_than_there_are(case):
    return case.train("--captioning_mask_prob", "1.5")


@bad(r"--num_max_bpe_tokens 2000: the model has room for 1022 tokens: lower it")
def captions_longer_than_the_position_table(case):
    return case.evaluate("--num_max_bpe_tokens", "2000")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_overwrites_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(java_metrics, "_package_folder", lambda: None)
    spoil, message = BAD[name]
    case = Case(tmp_path)
    argv = spoil(case)
    before = tree(case.output, case.data)
    code, line = failure(capsys, argv)
    assert code == 2, line
    assert re.search(message, line), line
    assert tree(case.output, case.data) == before


def test_a_caption_longer_than_the_limit_is_cut_and_trained_on(tmp_path, capsys):
    case = Case(tmp_path)
    case.edit(TRAIN, lambda rows: rows[0].update(text_segment=[5] * 500))
    program(*case.train("--no_validation"))
    assert (case.output / "checkpoint-step1" / "model.pth").is_file()
