"""scripts/main.py, the course baseline: results, stops, several processes, the hold-out, ways beyond it, bad input."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.baseline_vqa import build_answer_ids, build_word_ids, question_vector
from data.metrics.vizwiz import process_text
from engine import distributed
from engine.weights import read_state_dict
from models import baseline
from scripts import baseline_vqa
from scripts import main as program_module
from scripts.baseline_args import parse_args
from tests.helpers import run_in_processes, run_program
from tests.paths import ROOT
from tests.scripts.bad_inputs import BadInputs, failure
from tests.scripts.vle_run import copy_of
from tests.scripts.vqa_run import differences, read_lines, tree

SIDE = 16
COLOURS = ("red", "green", "blue")
QUESTIONS = ("What color is this?", "Colour, please", "...")  # the last is empty once normalised


def write_course(folder: Path, *, train: int = 13, valid: int = 7) -> Path:
    """Noise of one colour each; seven of ten people name it, two say unanswerable, one nothing."""
    rng = np.random.default_rng(0)
    for split, amount in (("train", train), ("valid", valid)):
        (folder / split).mkdir(parents=True)
        columns: dict[str, dict[str, object]] = {"image": {}, "question": {}, "answers": {}}
        for row in range(amount):
            name = f"{split}_{row:05d}.jpg"
            pixels = rng.integers(0, 60, (SIDE, SIDE + 4, 3), dtype=np.uint8)
            pixels[..., row % 3] += 180
            Image.fromarray(pixels).save(folder / split / name)
            texts = [COLOURS[row % 3]] * 6 + [f"The {COLOURS[row % 3]}."] + ["unanswerable"] * 2 + ["a."]
            columns["image"][str(row)] = name
            columns["question"][str(row)] = QUESTIONS[(row // 3) % 3]
            columns["answers"][str(row)] = [{"answer": text, "answer_confidence": "yes"} for text in texts]
        if split == "valid":
            del columns["answers"]
        (folder / f"{split}.json").write_text(json.dumps(columns))
    return folder


def shrink(patch: pytest.MonkeyPatch) -> None:
    """The same network, of a few channels."""
    patch.setattr(baseline, "_STAGES", ((8, 1), (8, 2), (16, 2), (16, 2)))
    patch.setattr(baseline, "_STEM_WIDTH", 8)
    patch.setattr(baseline, "FEATURES", 16)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """Data folder; do not change it."""
    return write_course(tmp_path_factory.mktemp("course") / "data")


@pytest.fixture(scope="module")
def trained(course) -> Path:
    """Output of three epochs; do not change it."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        program(*flags(course, course.parent / "trained"))
    return course.parent / "trained"


def flags(data: Path, output: Path, *more: object) -> list[str]:
    """Three epochs of three steps of four; later flags win."""
    argv = ["--data_path", data, "--output_dir", output, "--image_size", SIDE, "--batch_size", 4, "--epochs", 3]
    return [str(flag) for flag in [*argv, "--device", "cpu", "--num_workers", 0, *more]]


def predict_flags(data: Path, output: Path, *more: object) -> list[str]:
    argv = ["--data_path", data, "--output_dir", output, "--predict_only", "--eval_batch_size", 2]
    return [str(flag) for flag in [*argv, "--device", "cpu", "--num_workers", 0, *more]]


def program(*argv: object) -> None:
    """Call the program in this process, with one thread as the other tests' processes have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        program_module.main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


def submission(folder: Path) -> np.ndarray:
    return np.load(folder / "submission.npy", allow_pickle=False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """``model.pth`` as its users load it."""
    return torch.load(folder / "model.pth", weights_only=True)


def log_of(folder: Path) -> list[dict]:
    return read_lines(folder / "baseline_run" / "log.txt")


# ---- a run ----


def test_without_flags_it_has_the_recipe_of_the_original(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    args = parse_args([])
    assert (args.seed, args.batch_size, args.epochs, args.lr, args.weight_decay) == (42, 128, 20, 1e-3, 1e-5)
    assert (args.image_size, args.question_encoder, args.amp, args.output_dir) == (224, "words", "no", ".")
    extras = (args.augment, args.hold_out, args.class_mapping, args.min_answer_count, args.reference_behaviour)
    assert not any(extras)


def test_the_guides_command_writes_both_files_of_the_whole_network_into_the_current_folder(course, tmp_path):
    (tmp_path / "data").symlink_to(course)
    small = ["--image_size", "16", "--batch_size", "4", "--max_steps", "1", "--num_workers", "1", "--device", "cpu"]
    done = run_program(ROOT / "scripts" / "main.py", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = ["baseline_run", "data", "dictionaries.json", "model.pth", "submission.npy"]
    assert sorted(os.listdir(tmp_path)) == [".plainvl_written.jsonl", *written]
    state = weights(tmp_path)
    assert state["resnet.layer4.1.conv2.weight"].shape == (512, 512, 3, 3)
    assert state["resnet.layer2.0.shortcut.0.bias"].shape == (128,)
    assert state["text_encoder.weight"].shape == (512, len("what color is this colour please".split()) + 1 + 1)
    assert state["fc.2.weight"].shape == (5, 512)  # three colours, unanswerable, and the empty one
    assert len(submission(tmp_path)) == 7
    again = run_program(ROOT / "scripts" / "main.py", *small, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("name", ["model.pth", "dictionaries.json", "submission.npy"])
def test_results_of_others_are_left_alone_unless_told_otherwise(course, trained, tmp_path, capsys, name):
    run = copy_of(trained, tmp_path / "run")
    (run / name).write_bytes(b"mine")
    before = tree(run)
    code, line = failure(capsys, flags(course, run), program)
    assert (code, tree(run)) == (2, before)
    assert line.endswith(f"{run / name} is there and was not written by this program, or was changed since: move it "
                         "away, or give --overwrite to replace it")  # fmt: skip
    program(*flags(course, run, "--dry_run"))
    assert tree(run) == before
    program(*flags(course, run, "--overwrite"))
    assert (run / name).read_bytes() == (trained / name).read_bytes()


def test_a_prediction_replaces_its_own_submission_and_no_other(course, trained, tmp_path, capsys):
    argv = predict_flags(course, tmp_path, "--model_path", trained / "model.pth")
    (tmp_path / "model.pth").write_bytes(b"not written by a prediction, so not looked at")
    program(*argv)
    program(*argv)
    np.save(tmp_path / "submission.npy", np.array(["from elsewhere"]))
    code, line = failure(capsys, argv, program)
    assert (code, "submission.npy is there and was not written by this program" in line) == (2, True)
    assert submission(tmp_path).tolist() == ["from elsewhere"]


def test_it_learns_colours_and_answers_in_the_order_of_the_file(tmp_path):
    data = write_course(tmp_path / "data", train=48)
    more = ["--image_size", 4 * SIDE, "--batch_size", 16, "--epochs", 15, "--lr", 3e-3]
    program(*flags(data, tmp_path / "out", *more))
    assert log_of(tmp_path / "out")[-1]["train_acc"] > 0.9
    found = submission(tmp_path / "out")
    assert found.dtype == np.dtype("<U5")
    assert found.tolist() == [COLOURS[row % 3] for row in range(7)]


def test_model_pth_is_a_bare_state_dict_that_loads_strictly(trained):
    state = weights(trained)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    baseline.BaselineVQA(
        *(state[f"{name}.weight"].shape[axis] for name, axis in (("text_encoder", 1), ("fc.2", 0)))
    ).load_state_dict(state, strict=True)


def test_the_start_weights_are_those_of_the_originals_seed(course, tmp_path):
    program(*flags(course, tmp_path, "--lr", "0", "--max_steps", "1", "--reference_behaviour"))
    torch.manual_seed(42)
    fresh = baseline.BaselineVQA(8, 5)
    found = weights(tmp_path)
    assert (
        differences(
            {name: value.data for name, value in fresh.named_parameters()},
            {n: found[n] for n in dict(fresh.named_parameters())},
        )
        == []
    )


def test_the_weights_decay_as_a_part_of_the_gradient_also_biases_and_norms(course, tmp_path):
    def after_a_step(decay: float) -> dict[str, torch.Tensor]:
        output = tmp_path / f"{decay}"
        program(*flags(course, output, "--weight_decay", decay, "--max_steps", "1", "--lr", "0.01"))
        return weights(output)

    # so large that it is the sign of the gradient: Adam's first step is the rate
    torch.manual_seed(42)
    start = dict(baseline.BaselineVQA(8, 5).named_parameters())
    found = after_a_step(1e6)
    for name in ("fc.2.weight", "resnet.bn1.weight", "resnet.fc.bias"):
        torch.testing.assert_close(found[name], (start[name] - 0.01 * start[name].sign()).detach(), atol=1e-5, rtol=0)
    assert not torch.equal(after_a_step(0)["fc.2.weight"], found["fc.2.weight"])


def test_a_dry_run_writes_nothing(course, tmp_path, capsys):
    program(*flags(course, tmp_path / "none", "--dry_run", "--hold_out", "0.3"))
    assert "dry run: two steps taken, nothing written" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    program(*flags(course, tmp_path / "none", "--limit_samples", "5", "--save_ckpt_steps", "1", "--max_steps", "1"))
    before = tree(tmp_path)
    program(*predict_flags(course, tmp_path / "none", "--dry_run"))
    assert tree(tmp_path) == before
    assert len(submission(tmp_path / "none")) == 5


# ---- stops ----


def test_a_run_that_goes_on_after_max_steps_ends_like_an_unbroken_one(course, trained, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    program(*flags(course, whole, "--augment"))
    assert differences(weights(whole), weights(trained)) != []
    program(*flags(course, run, "--augment", "--max_steps", "4"))  # inside the second epoch
    assert differences(weights(whole), weights(run)) != []
    program(*flags(course, run, "--augment"))
    assert differences(weights(whole), weights(run)) == []
    assert (whole / "submission.npy").read_bytes() == (run / "submission.npy").read_bytes()
    cut, *others = [row for row in log_of(run) if row["epoch"] == 1]
    assert (log_of(run)[-1], others) == (log_of(whole)[-1], [])
    assert cut == log_of(whole)[1]


_KILLS_ITSELF = """
import os, signal, sys
import pytest
from scripts import baseline_vqa, main
from scripts.program import run
from tests.scripts.test_baseline_program import shrink
number, argv = int(sys.argv[1]), sys.argv[2:]
shrink(pytest.MonkeyPatch())
forward, calls = baseline_vqa.forward, []

def killed(*arguments):
    calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*arguments)

baseline_vqa.forward = killed
run(lambda: main.main(argv))
"""


def test_a_run_killed_while_answering_ends_like_an_unbroken_one(course, trained, tmp_path):
    argv = flags(course, tmp_path, "--eval_batch_size", "2")
    done = run_program("-c", _KILLS_ITSELF, "12", *argv)  # after nine steps and two of four batches of answers
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert differences(weights(tmp_path), weights(trained)) == []
    assert not (tmp_path / "submission.npy").exists()
    assert len(read_lines(tmp_path / ".partial-valid-rank0.jsonl")) == 1 + 2  # the key, then two batches
    program(*argv)
    assert submission(tmp_path).tolist() == submission(trained).tolist()
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(trained))


def test_a_changed_dictionary_does_not_go_on_from_the_checkpoint(course, trained, tmp_path, capsys):
    output = copy_of(trained, tmp_path / "run")
    before = tree(output)
    code, line = failure(capsys, flags(course, output, "--min_answer_count", "5"), program)
    assert code == 2
    assert "was trained with other questions, answers or model flags" in line
    assert tree(output) == before
    code, line = failure(capsys, flags(course, output, "--no_auto_resume"), program)
    assert (code, tree(output)) == (2, before)


# ---- several processes ----


def _train_and_predict(rank: int, train: list[str], predict: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        program(*train)
        program(*predict)
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(rank + 1)
    baseline_vqa.share_statistics(norm)  # before a validation: those of the process whose weights are saved
    assert norm.running_mean.tolist() == [1, 1]


def test_two_processes_train_score_and_answer_every_question_once(course, trained, tmp_path):
    train = flags(course, tmp_path / "two", "--batch_size", "2", "--hold_out", "0.2")
    predict = predict_flags(course, tmp_path / "again", "--model_path", trained / "model.pth")
    run_in_processes(_train_and_predict, 2, train, predict)
    rows = log_of(tmp_path / "two")
    assert len(rows) == 3
    assert all(0 <= row["val_accuracy"] <= 100 for row in rows)
    program(*predict_flags(course, tmp_path / "one", "--model_path", tmp_path / "two" / "model.pth"))
    assert submission(tmp_path / "two").tolist() == submission(tmp_path / "one").tolist()
    assert submission(tmp_path / "again").tolist() == submission(trained).tolist()
    assert distributed.world_size() == 1


# ---- the hold-out ----


def test_the_best_epoch_on_the_hold_out_answers(course, tmp_path, capsys):
    program(*flags(course, tmp_path, "--hold_out", "0.3"))
    said = capsys.readouterr().err
    facts = json.loads((tmp_path / "baseline_run" / "run.json").read_text())
    assert (facts["held_out_questions"], facts["training_questions"]) == (4, 9)
    assert facts["accuracy_of_always_unanswerable"] == 60.0  # two of ten people, by the course's rule
    best = max(row["val_accuracy"] for row in log_of(tmp_path))
    assert f"best accuracy on the hold-out {best:.2f}" in said
    saved = read_state_dict(tmp_path / "baseline_run" / "checkpoint-best")
    assert differences(saved, weights(tmp_path)) == []


# ---- ways beyond the original ----


@pytest.mark.parametrize("reference", [[], ["--reference_behaviour"]])
def test_an_empty_answer_is_given_with_the_defect_of_the_original_only(course, tmp_path, reference):
    weights_file = tmp_path / "model.pth"
    model = baseline.BaselineVQA(8, 5)
    with torch.no_grad():  # classes: red, unanswerable, the empty one, green, blue
        model.fc[2].weight.zero_()
        model.fc[2].bias.copy_(torch.tensor([0.0, 0.0, 2.0, 1.0, 0.0]))
    torch.save(model.state_dict(), weights_file)
    program(*predict_flags(course, tmp_path, "--image_size", SIDE, *reference))
    assert set(submission(tmp_path)) == ({""} if reference else {"green"})


def test_weights_of_the_original_answer_as_its_own_program_does(course, trained, tmp_path):
    """No dictionaries.json: they are made from train.json in the same way."""
    (tmp_path / "model.pth").write_bytes((trained / "model.pth").read_bytes())
    program(*predict_flags(course, tmp_path, "--image_size", SIDE, "--reference_behaviour"))
    train, valid = (json.loads((course / f"{split}.json").read_text()) for split in ("train", "valid"))
    word_ids = build_word_ids(train["question"].values(), process_text)
    people = [[given["answer"] for given in of_question] for of_question in train["answers"].values()]
    answers = list(build_answer_ids(people, process_text))
    model = baseline.BaselineVQA(len(word_ids) + 1, len(answers))
    model.load_state_dict(weights(trained))
    expected = []
    for name, question in zip(valid["image"].values(), valid["question"].values(), strict=True):
        with Image.open(course / "valid" / name) as picture:
            pixels = np.array(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        vector = question_vector(question, word_ids, process_text, reference=True)[None]
        expected.append(answers[model.eval()(image, vector).argmax().item()])
    assert submission(tmp_path).tolist() == expected


def test_subwords_are_kept_for_a_resumed_run_and_for_predictions(course, tmp_path, monkeypatch):
    argv = flags(course, tmp_path, "--question_encoder", "subwords", "--vocab_size", "40")
    program(*argv, "--max_steps", "4")
    monkeypatch.setattr("scripts.baseline_vqa.train_subwords", lambda *_: pytest.fail("learnt anew"))
    program(*argv)
    known = json.loads((tmp_path / "dictionaries.json").read_text())
    assert known.keys() == {"image_size", "reference_behaviour", "subwords", "answers"}
    before = submission(tmp_path).tolist()
    assert len(log_of(tmp_path)) == 3
    program(*predict_flags(course, tmp_path / "again", "--model_path", tmp_path / "model.pth"))
    assert submission(tmp_path / "again").tolist() == before


def test_a_class_mapping_and_a_least_count_make_the_answer_list_smaller(course, tmp_path, capsys):
    mapping = tmp_path / "classes.csv"
    mapping.write_text("answer,class_id\nwarm,5\nRed.,5\ngreen,2\n")
    program(*flags(course, tmp_path / "mapped", "--class_mapping", mapping))
    assert json.loads((tmp_path / "mapped" / "dictionaries.json").read_text())["answers"] == {
        "warm": 0,
        "red": 0,
        "green": 1,
    }
    run_facts = json.loads((tmp_path / "mapped" / "baseline_run" / "run.json").read_text())
    assert (run_facts["training_questions"], run_facts["questions_without_a_known_answer"]) == (9, 4)  # the blue ones
    assert set(submission(tmp_path / "mapped")) <= {"warm", "green"}
    # 13 questions: 26 times unanswerable, 35 red, 28 green and 28 blue ones
    program(*flags(course, tmp_path / "counted", "--min_answer_count", "27", "--max_steps", "1"))
    known = json.loads((tmp_path / "counted" / "dictionaries.json").read_text())["answers"]
    assert known == {"red": 0, "green": 1, "blue": 2}


# ---- bad input ----

BAD = BadInputs()
bad = BAD.register


def change(path: Path, **columns: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (content | columns).items() if value is not None}))


@bad("no folder .*absent: put train.json")
def no_data_folder(data, output):
    return ["--data_path", data / "absent"]


@bad("no such file: .*train.json")
def no_train_file(data, output):
    (data / "train.json").unlink()
    return []


@bad("no such file: .*valid.json")
def no_valid_file(data, output):
    (data / "valid.json").unlink()
    return []


@bad("train.json:1: not JSON .*cut off")
def a_cut_train_file(data, output):
    text = (data / "train.json").read_text()
    (data / "train.json").write_text(text[: len(text) // 2])
    return []


@bad("train.json: image train_00000.jpg has no answers to learn from")
def no_answers(data, output):
    change(data / "train.json", answers=None)
    return []


@bad('train.json: row 0 is not in both columns "image" and "answers"')
def answers_of_one_row_only(data, output):
    change(data / "train.json", answers={"1": [{"answer": "red"}]})
    return []


@bad("1 of 13 images are not in .*train, the first: train_00003.jpg; check --data_path")
def a_missing_training_image(data, output):
    (data / "train" / "train_00003.jpg").unlink()
    return []


@bad("7 of 7 images are not in .*valid")
def no_valid_images(data, output):
    (data / "valid").rename(data / "elsewhere")
    return []


@bad(r"cannot read image .*train_00003.jpg: it holds text, not an image")
def a_broken_training_image(data, output):
    (data / "train" / "train_00003.jpg").write_text("no image")
    return []


@bad(r"contains '\.\.'; paths in data files must stay inside")
def an_image_outside_the_folder(data, output):
    images = json.loads((data / "train.json").read_text())["image"]
    change(data / "train.json", image=images | {"0": "../valid/valid_00000.jpg"})
    return []


@bad("has the columns text, class_id: they must be answer,class_id")
def a_class_mapping_of_other_columns(data, output):
    (data / "classes.csv").write_text("text,class_id\nred,1\n")
    return ["--class_mapping", data / "classes.csv"]


@bad("cannot read --class_mapping absent.csv")
def no_class_mapping(data, output):
    return ["--class_mapping", "absent.csv"]


@bad("no training question has one of the 1 answers: mend --class_mapping")
def a_class_mapping_of_other_answers(data, output):
    (data / "classes.csv").write_text("answer,class_id\nviolet,1\n")
    return ["--class_mapping", data / "classes.csv"]


@bad("no answer was given 1000 times or more: lower --min_answer_count")
def only_rare_answers(data, output):
    return ["--min_answer_count", 1000]


@bad("both choose the answers")
def two_answer_lists(data, output):
    return ["--min_answer_count", 2, "--class_mapping", "x.csv"]


@bad("is the original's, which has no --question_encoder subwords")
def the_originals_subwords(data, output):
    return ["--reference_behaviour", "--question_encoder", "subwords"]


@bad("13 training samples do not fill one step of 128 .*: lower the batch size")
def a_batch_larger_than_the_data(data, output):
    return ["--batch_size", 128]


@bad("--batch_size 1 with --image_size 16")
def one_value_for_batch_normalisation(data, output):
    return ["--batch_size", 1]


@bad(r"--seed: must be below 2\*\*63, got 99999999999999999999999")
def a_seed_that_no_generator_takes(data, output):
    return ["--seed", "99999999999999999999999"]


@bad("--hold_out 1 of 13 rows leaves nothing to train on")
def everything_held_out(data, output):
    return ["--hold_out", 1]


@bad("has 2 answers; the accuracy compares at least 4 people")
def too_few_people_to_score(data, output):
    answers = json.loads((data / "train.json").read_text())["answers"]
    change(data / "train.json", answers={row: given[:2] for row, given in answers.items()})
    return ["--hold_out", 0.2]


@bad("--output_dir .*submission.npy/baseline_run cannot be written")
def an_output_folder_that_is_a_file(data, output):
    return ["--output_dir", output / "submission.npy"]


@bad("float16 needs a CUDA device")
def half_precision_on_the_cpu(data, output):
    return ["--amp", "fp16"]


@bad("--model_path is for predictions")
def weights_for_training(data, output):
    return ["--model_path", "model.pth"]


@bad("no weights .*absent.pth to predict with")
def no_weights(data, output):
    return ["--predict_only", "--model_path", output / "absent.pth"]


@bad(r"--image_size: .*dictionaries.json says it already")
def a_flag_beside_the_dictionaries(data, output):
    (output / "dictionaries.json").write_text("{}")
    (output / "model.pth").touch()
    return ["--predict_only"]


@bad(r"does not fit the model \(.*text_encoder.weight \(16, 3\) in the file, \(16, 8\) in the model")
def weights_of_other_dictionaries(data, output):
    torch.save(baseline.BaselineVQA(3, 5).state_dict(), data / "other.pth")
    return ["--predict_only", "--model_path", data / "other.pth"]


@bad("other.pth is refused: it holds pickled Python objects")
def weights_that_are_a_program(data, output):
    torch.save(run_program, data / "other.pth")
    return ["--predict_only", "--model_path", data / "other.pth"]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_of_exit_code_2_and_older_results_stay(course, tmp_path, capsys, name):
    spoil, message = BAD[name]
    data, output = copy_of(course, tmp_path / "data"), tmp_path / "output"
    output.mkdir()
    (output / "submission.npy").write_bytes(b"older")
    more = [*spoil(data, output), "--overwrite"]
    before = tree(output)
    code, line = failure(capsys, flags(data, output, *more), program)
    assert (code, bool(re.search(message, line))) == (2, True), line
    if name == "a_broken_training_image":  # is met in a step
        assert {path: known for path, known in tree(output).items() if "baseline_run" not in path} == before
    else:
        assert tree(output) == before
        assert not (output / "baseline_run").exists()


def test_broken_images_can_be_replaced(course, tmp_path, capsys):
    data = copy_of(course, tmp_path / "data")
    (data / "valid" / "valid_00003.jpg").write_text("no image")
    program(*flags(data, tmp_path / "out", "--skip_broken_images", "--max_steps", "1"))
    assert "1 images could not be read and were replaced by a grey one" in capsys.readouterr().err
    assert len(submission(tmp_path / "out")) == 7
