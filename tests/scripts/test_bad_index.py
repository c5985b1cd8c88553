"""Damaged and odd index files, through ``make_index.py --check`` and through the program: refused alike, or read alike.

Nothing has been trained or written when a file is refused.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import make_index
from scripts.program import run
from tests.scripts.bad_inputs import the_error_line
from tests.scripts.test_bad_inputs import REST, Case, without_partial_results
from tests.scripts.vqa_run import failure, program, read_lines, tree

TRAIN = "vqa.train.jsonl"
FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {}  # name → (index file, what spoils it, message)


def fault(message: str, name: str = REST) -> Callable:
    """Register a function that spoils an index file, and what both programs must say of it."""

    def register(spoil: Callable[[Path], None]) -> Callable:
        FAULTS[spoil.__name__] = (name, spoil, message)
        return spoil

    return register


def change_line(path: Path, number: int, **changes: object) -> None:
    """Replace values of one line; ``...`` removes a key."""
    lines = path.read_text().splitlines()
    row = {key: value for key, value in (json.loads(lines[number - 1]) | changes).items() if value is not ...}
    lines[number - 1] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")


@fault(r"no such file: .*vqa.rest_val.jsonl: run scripts/make_index.py")
def a_missing_file(path):
    path.unlink()


@fault(r"vqa.rest_val.jsonl is empty: run scripts/make_index.py")
def an_empty_file(path):
    path.write_bytes(b"")


@fault(r"vqa.rest_val.jsonl:\d+: the last line is cut off \(.*\): make the file again")
def a_last_line_that_is_cut_off(path):
    path.write_bytes(path.read_bytes()[:-20])


@fault(r"vqa.rest_val.jsonl:2: not UTF-8 text: save the file as UTF-8")
def text_that_is_not_utf8(path):
    path.write_bytes(path.read_bytes().replace(b'\n{"', b'\n{"\xe9', 1))


@fault(r"vqa.rest_val.jsonl:2: the key 'qid' is missing, this is no VQA index line")
def a_missing_key(path):
    change_line(path, 2, qid=...)


@fault(r"vqa.rest_val.jsonl:2: labels must be a list of whole numbers, got 'red'")
def a_wrong_type(path):
    change_line(path, 2, labels="red")


@fault(r"vqa.rest_val.jsonl:2: question id \d+ stands twice")
def a_question_id_twice(path):
    change_line(path, 2, qid=json.loads(path.read_text().splitlines()[0])["qid"])


@fault(r"vqa.rest_val.jsonl:2: '/etc/hostname' is absolute; paths in data files are relative to the data folder")
def an_absolute_image_path(path):
    change_line(path, 2, image_path="/etc/hostname")


@fault(r"vqa.rest_val.jsonl:2: 'val2014/../../x.jpg' contains '..'; paths in data files must stay inside")
def an_image_path_that_leads_out(path):
    change_line(path, 2, image_path="val2014/../../x.jpg")


@fault(r"vqa.rest_val.jsonl:2: text_segment is empty; every question needs a text")
def an_empty_question(path):
    change_line(path, 2, text_segment=[])


@fault(r"vqa.rest_val.jsonl:2: labels must be at least 0 and below \d+, the size of the answer list, got 3129")
def a_label_beyond_the_answer_list(path):
    change_line(path, 2, labels=[3129], scores=[1.0])


@fault(r"vqa.rest_val.jsonl:2: a score must be a number in \[0, 1\], got \[1.5\]")
def a_score_above_one(path):
    change_line(path, 2, labels=[0], scores=[1.5])


@fault(r"vqa.train.jsonl:1: question \d+ has no labels, training data need them", TRAIN)
def training_questions_without_any_label(path):
    rows = read_lines(path)
    path.write_text("".join(json.dumps(row | {"labels": [], "scores": []}) + "\n" for row in rows))


@fault(r"vqa.train.jsonl is empty: run scripts/make_index.py", TRAIN)
def a_split_without_samples(path):
    path.write_text("\n\n")


@fault(r"vqa.rest_val.jsonl:2: not JSON \(NaN is not a JSON number\): mend or remove the line")
def nan_as_a_score(path):
    change_line(path, 2, labels=[0], scores=[float("nan")])


@fault(r"7 (of \d+ )?images are (missing|not) in .*the first:? (val2014/COCO_val2014_\d+.jpg[,;:]? ?){5}")
def images_that_are_not_there(path):
    images = list(dict.fromkeys(row["image_path"] for row in read_lines(path)))
    for image in images[:7]:
        (path.parent / image).unlink()


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_index_is_refused_by_the_check_and_by_the_program_before_anything_starts(name, tmp_path, capsys):
    file_name, spoil, message = FAULTS[name]
    case = Case(tmp_path)
    spoil(case.data / file_name)
    before = tree(tmp_path)
    argv = case.train() if file_name == TRAIN else case.evaluate()
    for code, line in (check(capsys, case.data), failure(capsys, argv)):
        assert code == 2, line
        assert re.search(message, line), line
    assert without_partial_results(tree(tmp_path)) == before


def check(capsys: pytest.CaptureFixture, data: Path) -> tuple[int, str]:
    """Exit code and error line of ``make_index.py --check``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(lambda: make_index.main(["vqav2", "--data_path", str(data), "--check"]))
    return left.value.code, the_error_line(capsys.readouterr().err)


def with_byte_order_mark(content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content


def with_carriage_returns(content: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n")


def with_a_question_of_5000_tokens(content: bytes) -> bytes:
    first, _, rest = content.partition(b"\n")
    return json.dumps(json.loads(first) | {"text_segment": [5] * 5000}).encode() + b"\n" + rest


@pytest.mark.parametrize("change", [with_byte_order_mark, with_carriage_returns, with_a_question_of_5000_tokens])
def test_an_odd_index_passes_the_check_and_every_question_is_answered(change, tmp_path, capsys):
    case = Case(tmp_path)
    (case.data / REST).write_bytes(change((case.data / REST).read_bytes()))
    make_index.main(["vqav2", "--data_path", str(case.data), "--check"])
    assert "every line is sound" in capsys.readouterr().out
    program(*case.evaluate())
    answered = json.loads((case.output / "submit_vqav2_val.json").read_text())
    assert len(answered) == sum(1 for line in (case.data / REST).read_bytes().splitlines() if line)


def test_images_behind_a_link_that_the_user_placed_are_read(tmp_path):
    case = Case(tmp_path)
    (case.data / "val2014").rename(tmp_path / "elsewhere")
    (case.data / "val2014").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    program(*case.evaluate())
    assert len(json.loads((case.output / "submit_vqav2_val.json").read_text())) > 10
