"""scripts/model_vqa_loader.py and what follows it: answers as recorded, whatever batches and stops; scores; errors."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from data.clip_images import normalize
from data.errors import DataError
from data.images import load_image
from data.llava_conversation import TEMPLATES
from data.llava_images import LlavaTransform
from data.llava_questions import answer_ids, encode_questions, read_llava_questions
from data.vizwiz import VizWizAnswer, VizWizRow
from engine.weights import read_state_dict
from models.llava.generation import Decoding, beam_search
from models.lora import LoRALinear
from scripts import ask, convert_vizwiz_for_submission, format_result_for_submission, llava_vqa, model_vqa_loader
from scripts.llava_folder import read_llava_folder
from scripts.llava_inference import inference_dtype, settle_adapters
from scripts.program import run
from scripts.written_files import RECORD
from tests.helpers import run_in_processes, run_program
from tests.parity.fixture_files import fixture_path, load_fixture
from tests.scripts.bad_inputs import BadInputs, failure
from tests.scripts.vqa_run import read_lines, tree

TEXTS = ("What is this?", "what", "Which color is it, please, and why?", "Is it on?", "How many keys are there?")
NUM_QUESTIONS, BATCH_SIZE, KILLED_AT = 10, 3, 2


@pytest.fixture(scope="module")
def tiny() -> Path:
    return fixture_path("llava_tiny")


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """Ten questions of unequal length about the three images."""
    path = tmp_path_factory.mktemp("asked") / "questions.jsonl"
    rows = [
        {"question_id": f"q{number}", "image": f"valid_0000{number % 3}.png", "text": f"{TEXTS[number % 5]} {number}"}
        for number in range(NUM_QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def program(*argv: object) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model_vqa_loader.main([str(argument) for argument in argv])
    finally:
        torch.set_num_threads(threads)


def flags(tiny: Path, questions: Path, output: Path, *more: object, model: str = "llava") -> list[str]:
    """Later flags win."""
    needed = ["--model-path", tiny / model, "--question-file", questions, "--image-folder", tiny / "images"]
    rest = ["--answers-file", output, "--device", "cpu", "--num_workers", "0", "--max_new_tokens", "16"]
    return [str(argument) for argument in (*needed, *rest, *more)]


def texts(path: Path) -> list[str]:
    return [row["text"] for row in read_lines(path)]


def hidden(folder: Path) -> list[str]:
    """What a stop leaves."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != RECORD)


@pytest.fixture(scope="module")
def whole(tiny, asked, tmp_path_factory) -> bytes:
    """The answers file of an unbroken run, three questions a batch."""
    output = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    program(*flags(tiny, asked, output, "--batch_size", BATCH_SIZE))
    assert hidden(output.parent) == []
    return output.read_bytes()


# ---- answers ----


@pytest.mark.parametrize(
    ("model", "recorded", "more"),
    [
        ("llava", "llava", ()),
        ("llava-hf", "llava", ("--tokenizer", "llava")),
        ("llava-lora", "lora", ("--model_base", "llava")),
        ("llava-lora", "lora", ()),
    ],
)
def test_the_recorded_answers_of_every_kind_of_folder(tiny, tmp_path, model, recorded, more):
    more = [tiny / value if value == "llava" else value for value in more]
    program(*flags(tiny, tiny / "questions.jsonl", tmp_path / "a.jsonl", *more, model=model))
    expected = load_fixture("llava_tiny/expected.pt")["outputs"][recorded]
    rows = read_lines(tmp_path / "a.jsonl")
    assert [(row["question_id"], row["text"]) for row in rows] == [(e["question_id"], e["text"]) for e in expected]
    asked = read_lines(tiny / "questions.jsonl")
    for row, question in zip(rows, asked, strict=True):
        assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert (row["prompt"], row["model_id"], row["metadata"]) == (question["text"], model, {})
    assert len({row["answer_id"] for row in rows}) == len(rows)


# as DeepSpeed's stages 0 to 2 leave it; a tokenizer that was laid beside is no model either
_OF_ZERO_2 = (
    *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "deepspeed_run.pth"),
    *("rng-rank0.pth", "manifest.json", "training_data.json", "tokenizer.model"),
)


@pytest.mark.parametrize(("is_plain", "beside"), [(False, ()), (True, ()), (True, _OF_ZERO_2)])
def test_a_projector_that_was_trained_alone_answers_over_its_base(tiny, tmp_path, capsys, is_plain, beside):
    """Over the language model it started from, or over a whole LLaVA with another projector."""
    state = read_state_dict(tiny / "llava")
    config = json.loads((tiny / "llava/config.json").read_text())
    for name in ("stage1", "base"):
        (tmp_path / name).mkdir()
    (tmp_path / "stage1/config.json").write_text(json.dumps(config | {"_name_or_path": str(tmp_path / "base")}))
    projector = {name: value for name, value in state.items() if "mm_projector" in name}
    torch.save(projector, tmp_path / "stage1/mm_projector.bin")
    for name in beside:
        shutil.copy(tiny / "llava/tokenizer.model", tmp_path / "stage1" / name)
    of_base = {name: torch.zeros_like(value) if name in projector else value for name, value in state.items()}
    if is_plain:
        of_base = {name: value for name, value in state.items() if name not in projector}
        config = {key: value for key, value in config.items() if not key.startswith("mm_")}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    torch.save(of_base, tmp_path / "base/pytorch_model.bin")
    shutil.copy(tiny / "llava/tokenizer.model", tmp_path / "base")
    shutil.copytree(tiny / "clip", tmp_path / "clip")

    output = tmp_path / "out" / "a.jsonl"
    argv = [*flags(tiny, tiny / "questions.jsonl", output), "--model-path", tmp_path / "stage1"]
    program(*argv, "--model-base", tmp_path / "base")
    expected = load_fixture("llava_tiny/expected.pt")["outputs"]["llava"]
    assert texts(output) == [row["text"] for row in expected]
    question = read_lines(tiny / "questions.jsonl")[0]
    capsys.readouterr()
    asked = ["--checkpoint", tmp_path / "stage1", "--model_base", tmp_path / "base", "--device", "cpu", "--json"]
    asked += ["--image", tiny / "images" / question["image"], "--max_new_tokens", 16]
    ask.main([str(word) for word in (*asked, "--question", question["text"].removeprefix("<image>\n"))])
    assert json.loads(capsys.readouterr().out)["answer"] == expected[0]["text"]
    code, line = failure(capsys, argv, program)
    assert (code, "or ask it with the folder of its model as --model-base" in line) == (2, True), line


def test_the_names_of_models_and_files(tiny, asked, tmp_path, monkeypatch):
    assert model_vqa_loader.model_id(Path("a/run/checkpoint-20/")) == "run_checkpoint-20"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny / "images", tmp_path / "data/valid")
    shutil.copy(asked, tmp_path / "data/valid_for_llava.jsonl")
    program("--model-path", tiny / "llava", "--num-chunks", "5", "--chunk-idx", "1", "--device", "cpu")
    assert [row["question_id"] for row in read_lines(tmp_path / "eval/llava_5_1.jsonl")] == ["q2", "q3"]


def test_the_batch_changes_no_answer(tiny, asked, tmp_path, whole):
    for size in (1, 10):
        program(*flags(tiny, asked, tmp_path / f"{size}.jsonl", "--batch_size", size))
        assert (tmp_path / f"{size}.jsonl").read_bytes() == whole
    assert len(set(texts(tmp_path / "1.jsonl"))) == NUM_QUESTIONS  # so that a mix-up shows


def _evaluate_each(rank: int, calls: list[list[str]]) -> None:
    for argv in calls:
        program(*argv)


def test_two_processes_write_the_same_files(tiny, asked, tmp_path, whole):
    rows = [annotation(f"valid_0000{n}.png", ["unanswerable"] * 4 + ["cup"] * (5 * n)) for n in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more = ["--batch_size", BATCH_SIZE, "--annotations", tmp_path / "rows.json"]
    drawn = ["--batch_size", "2", "--temperature", "0.7"]
    for name, settings in (("one", more), ("drawn_one", drawn)):
        program(*flags(tiny, asked, tmp_path / f"{name}.jsonl", *settings))
    calls = [(tmp_path / "two.jsonl", more), (tmp_path / "drawn_two.jsonl", drawn)]
    run_in_processes(_evaluate_each, 2, [flags(tiny, asked, output, *settings) for output, settings in calls])
    assert (tmp_path / "two.jsonl").read_bytes() == whole
    assert (tmp_path / "two.scores.json").read_bytes() == (tmp_path / "one.scores.json").read_bytes()
    assert (tmp_path / "drawn_two.jsonl").read_bytes() == (tmp_path / "drawn_one.jsonl").read_bytes()
    assert hidden(tmp_path) == []


def test_drawn_answers_depend_on_seed_and_question_alone(tiny, asked, tmp_path, whole):
    def drawn(name: str, *more: object) -> list[str]:
        program(*flags(tiny, asked, tmp_path / name, "--temperature", "0.9", "--top_p", "0.95", *more))
        return texts(tmp_path / name)

    first = drawn("a", "--batch_size", "3")
    assert first == drawn("b", "--batch_size", "4")
    assert drawn("c", "--num-chunks", "2", "--chunk-idx", "1") == first[5:]
    assert first != drawn("d", "--seed", "1")
    assert len(set(first)) == NUM_QUESTIONS


def test_beams_are_those_of_each_prompt_alone(tiny, asked, tmp_path, whole):
    more = ["--num_beams", "3", "--length_penalty", "0.5", "--batch_size", "4", "--max_new_tokens", "6"]
    program(*flags(tiny, asked, tmp_path / "beams.jsonl", *more))
    folder = read_llava_folder(tiny / "llava", dtype=torch.float32)
    decoding = Decoding(max_new_tokens=6, num_beams=3, length_penalty=0.5)
    expected = []
    for joined in prompts(folder, tiny, asked):
        expected.append(folder.tokenizer.decode(beam_search(folder.model, joined, decoding)[0][0]).strip())
    assert texts(tmp_path / "beams.jsonl") == expected
    program(*flags(tiny, asked, tmp_path / "greedy.jsonl", "--max_new_tokens", "6"))
    assert texts(tmp_path / "greedy.jsonl") != expected


def prompts(folder, tiny, questions, then=()):
    """Each question as a batch of its own, with the ids of an answer behind it."""
    transform = LlavaTransform(folder.images, "pad")
    asked = read_llava_questions(questions)
    for question, ids in zip(
        asked, encode_questions(asked, folder.tokenizer, TEMPLATES["vicuna_v1"], max_tokens=99), strict=True
    ):
        pixels = normalize(transform(load_image(tiny / "images" / question.image))[None], folder.images)
        yield folder.model.join(torch.tensor([[*ids, *then]]), pixels, padding_side="left")


def test_chunks_cover_every_question_once(tiny, asked, tmp_path, whole):
    for index in range(3):
        chunk = ["--num-chunks", "3", "--chunk-idx", index, "--batch_size", BATCH_SIZE]
        program(*flags(tiny, asked, tmp_path / f"{index}.jsonl", *chunk))
    found = [(tmp_path / f"{index}.jsonl").read_bytes() for index in range(3)]
    assert [content.count(b"\n") for content in found] == [4, 4, 2]
    assert b"".join(found) == whole


def test_lower_precision_and_fewer_samples(tiny, asked, tmp_path, capsys):
    program(*flags(tiny, asked, tmp_path / "a.jsonl", "--amp", "bf16", "--limit_samples", "2", model="llava-lora"))
    assert "2 questions for llava-lora in bfloat16" in capsys.readouterr().err
    assert [row["question_id"] for row in read_lines(tmp_path / "a.jsonl")] == ["q0", "q1"]


def test_weights_are_float16_on_a_gpu_for_every_program():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert inference_dtype(None, cuda) is torch.float16  # also where the device has bfloat16, as the original
    assert inference_dtype(None, cpu) is torch.float32
    assert inference_dtype(torch.bfloat16, cuda) is torch.bfloat16


@pytest.mark.parametrize(("dtype", "is_merged"), [("float16", True), ("bfloat16", False), ("float32", True)])
def test_adapters_are_merged_where_their_changes_survive_the_rounding(tiny, dtype, is_merged):
    folder = read_llava_folder(tiny / "llava-lora", dtype=getattr(torch, dtype))
    exact = read_llava_folder(tiny / "llava-lora", dtype=torch.float32).model
    name = "layers.0.self_attn.q_proj"
    adapted = exact.model.get_submodule(name)
    settle_adapters(folder.model, getattr(torch, dtype))
    layer = folder.model.model.get_submodule(name)
    assert isinstance(layer, LoRALinear) is not is_merged
    if is_merged:
        expected = (adapted.weight + adapted.change()).to(getattr(torch, dtype))  # rounded once
        assert torch.equal(layer.weight, expected)
    else:
        assert torch.equal(layer.change(), adapted.change())


def test_both_programs_leave_adapters_unmerged_in_bfloat16(tiny, asked, tmp_path, capsys):
    program(*flags(tiny, asked, tmp_path / "a.jsonl", "--amp", "bf16", "--limit_samples", 1, model="llava-lora"))
    image = ["--image", str(tiny / "images/valid_00000.png"), "--device", "cpu", "--max_new_tokens", "2"]
    ask.main(["--checkpoint", str(tiny / "llava-lora"), "--question", "why?", "--dtype", "bfloat16", *image])
    assert capsys.readouterr().err.count("in bfloat16 the adapter is not merged") == 2


def test_a_dry_run_writes_nothing(tiny, asked, tmp_path, capsys):
    program(*flags(tiny, asked, tmp_path / "new/a.jsonl", "--dry_run", "--batch_size", "2"))
    assert "dry run: 4 questions answered, nothing written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_padding_id_without_a_row_is_no_problem(tiny, tmp_path):
    for name in ("llava", "clip"):
        shutil.copytree(tiny / name, tmp_path / name)
    config = json.loads((tmp_path / "llava/config.json").read_text())
    (tmp_path / "llava/config.json").write_text(json.dumps(config | {"pad_token_id": -1}))
    argv = flags(tiny, tiny / "questions.jsonl", tmp_path / "a.jsonl", "--model-path", tmp_path / "llava")
    program(*argv)
    assert texts(tmp_path / "a.jsonl") == [
        e["text"] for e in load_fixture("llava_tiny/expected.pt")["outputs"]["llava"]
    ]


# ---- stops ----

_KILLS_ITSELF = """
import os, signal, sys
from scripts import llava_vqa, model_vqa_loader
from scripts.program import run
generate, calls = llava_vqa.generate, []

def killed_generate(*arguments, **options):
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return generate(*arguments, **options)

llava_vqa.generate = killed_generate
run(lambda: model_vqa_loader.main(sys.argv[2:]))
"""


def count_batches(monkeypatch) -> list[int]:
    calls, original = [], llava_vqa.generate
    monkeypatch.setattr(llava_vqa, "generate", lambda *a, **o: (calls.append(1), original(*a, **o))[1])
    return calls


def test_a_killed_evaluation_goes_on_to_the_same_file(tiny, asked, tmp_path, whole, monkeypatch, capsys):
    output = tmp_path / "killed/answers.jsonl"
    argv = flags(tiny, asked, output, "--batch_size", BATCH_SIZE)
    done = run_program("-c", _KILLS_ITSELF, str(KILLED_AT), *argv)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # nobody holds the lock any more
    assert hidden(output.parent) == [".lock-answers.jsonl", ".partial-answers.jsonl-rank0.jsonl"]
    assert [path.name for path in output.parent.iterdir() if not path.name.startswith(".")] == []
    for name in ("other", "anew"):
        shutil.copytree(output.parent, tmp_path / name)

    calls = count_batches(monkeypatch)
    program(*argv)
    assert f"{KILLED_AT * BATCH_SIZE} of {NUM_QUESTIONS} results" in capsys.readouterr().err
    assert len(calls) == 4 - KILLED_AT
    assert output.read_bytes() == whole
    assert hidden(output.parent) == []

    other = tmp_path / "other/answers.jsonl"
    program(*flags(tiny, asked, other, "--batch_size", BATCH_SIZE, "--max_new_tokens", "15"))
    assert "discarded: it was another evaluation (other settings_sha256)" in capsys.readouterr().err
    assert len(calls) == 4 - KILLED_AT + 4
    program(*flags(tiny, asked, tmp_path / "anew/answers.jsonl", "--batch_size", BATCH_SIZE, "--no_auto_resume"))
    assert len(calls) == 4 - KILLED_AT + 8
    assert (tmp_path / "anew/answers.jsonl").read_bytes() == whole


def test_a_stop_signal_leaves_by_its_own_code_and_goes_on(tiny, asked, tmp_path, whole, monkeypatch, capsys):
    argv = flags(tiny, asked, tmp_path / "answers.jsonl", "--batch_size", BATCH_SIZE)
    calls, original = [], llava_vqa.generate

    def stopped(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(llava_vqa, "generate", stopped)
    with pytest.raises(SystemExit) as left:
        run(lambda: program(*argv))
    assert left.value.code == 128 + signal.SIGTERM
    assert "the same command goes on from here" in capsys.readouterr().err
    program(*argv)
    assert len(calls) == 4
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


# ---- scores and submissions ----


def annotation(image: str, answers: list[str], **more: object) -> dict:
    return {"image": image, "question": "x", "answers": [{"answer": text} for text in answers], **more}


def test_scores_of_a_run(tiny, tmp_path, capsys):
    """The last question is answered "SUPERUSERrovid"; three of ten people agree, that is 0.9."""
    nobody = [f"x{number}" for number in range(10)]
    rows = [
        annotation("valid_00000.jpg", nobody, answer_type="other", answerable=0),
        annotation("valid_00001.jpg", nobody, answer_type="number", answerable=1),
        annotation("valid_00002.jpg", ["superuserrovid"] * 3 + ["unanswerable"] * 7, answer_type="other"),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    more = ["--annotations", tmp_path / "rows.json", "--upload-file", tmp_path / "up/load.json"]
    more += ["--submission-file", tmp_path / "submission.npy", "--normalize", "process_text"]
    program(*flags(tiny, tiny / "questions.jsonl", tmp_path / "a.jsonl", *more))
    scores = json.loads((tmp_path / "a.scores.json").read_text())
    for rule in ("course", "textvqa", "vizwiz"):
        assert scores["accuracy"][rule] == {"overall": 30, "per_answer_type": {"number": 0, "other": 45}}
    assert scores["unanswerable"] == {"predicted": 0, "true": 2 / 3}  # by the key, and by the most frequent answer
    assert scores["questions"] == 3
    # F1: nothing reaches 0.5; average precision by hand, from the probabilities that each question has alone
    chances = unanswerable_chances(tiny, tiny / "questions.jsonl")
    assert all(0 < chance < 0.5 for chance in chances)
    order = sorted(range(3), key=lambda n: -chances[n])
    precisions = [(rank + 1 - (order.index(1) <= rank)) / (rank + 1) for rank in range(3) if order[rank] != 1]
    assert scores["answerability"] == {"average_precision": pytest.approx(100 * sum(precisions) / 2, abs=1e-3), "f1": 0}
    printed = capsys.readouterr().out
    assert "accuracy (course rule) 30.00 over 3 questions" in printed
    assert "unanswerable: 0.0 % of the answers, 66.7 % of the questions" in printed
    upload = json.loads((tmp_path / "up/load.json").read_text())
    assert [entry["image"] for entry in upload] == [f"valid_0000{number}.png" for number in range(3)]
    assert upload[2]["answer"] == "superuserrovid"
    submission = np.load(tmp_path / "submission.npy", allow_pickle=False)
    assert submission.tolist() == [entry["answer"] for entry in upload]


def unanswerable_chances(tiny: Path, questions: Path) -> list[float]:
    """Probability of the answer ``unanswerable``, word by word behind each prompt alone."""
    folder = read_llava_folder(tiny / "llava", dtype=torch.float32)
    words = answer_ids("unanswerable", folder.tokenizer, TEMPLATES["vicuna_v1"])
    assert words[-1] == folder.tokenizer.eos_id
    assert folder.tokenizer.decode(words) == "unanswerable"
    chances = []
    for joined in prompts(folder, tiny, questions, then=words):
        with torch.no_grad():
            logits = folder.model.lm_head(folder.model.model.decode(joined.embeds).tokens)[0]
        chance = logits.softmax(dim=-1).double()
        first = len(chance) - len(words) - 1
        chances.append(float(torch.stack([chance[first + n, word] for n, word in enumerate(words)]).prod()))
    return chances


def test_the_probability_of_unanswerable_is_that_of_its_words(tiny, asked, tmp_path):
    from engine.partial_results import PartialResults

    folder = read_llava_folder(tiny / "llava", dtype=torch.float32)
    questions = read_llava_questions(asked)
    dataset = llava_vqa.question_dataset(folder, questions, tiny / "images", template=TEMPLATES["vicuna_v1"])
    found = llava_vqa.answer(
        folder.model,
        llava_vqa.question_loader(dataset, batch_size=4),
        PartialResults(None, "", {}, range(NUM_QUESTIONS)),
        tokenizer=folder.tokenizer,
        images=folder.images,
        decoding=Decoding(max_new_tokens=2),
        device=torch.device("cpu"),
        unanswerable=answer_ids("unanswerable", folder.tokenizer, TEMPLATES["vicuna_v1"]),
    )
    assert list(found) == list(range(NUM_QUESTIONS))
    ours = [row["unanswerable"] for row in found.values()]
    assert ours == pytest.approx(unanswerable_chances(tiny, asked), rel=1e-4)  # measured: 4e-6


def test_scores_by_hand():
    def row(*given: str, **more: object) -> VizWizRow:
        return VizWizRow("x.jpg", "?", tuple(map(VizWizAnswer, given)), **more)

    rows = {
        3: row(*["a cup"] * 4, *["mug"] * 6, is_answerable=True),  # 1
        5: row(*["unanswerable"] * 10, is_answerable=False),  # 1
        9: row(*["yes"] * 2, *["no"] * 8, is_answerable=True),  # 0.6
        11: row(*["blue"] * 9, "red", is_answerable=False),  # 0
    }
    answers = {
        3: {"text": "cup", "unanswerable": 0.1},
        5: {"text": "Unanswerable", "unanswerable": 0.9},
        9: {"text": "yes", "unanswerable": 0.6},
        11: {"text": "unanswerable", "unanswerable": 0.2},
    }
    scores = llava_vqa.score(rows, answers)
    assert scores["accuracy"]["course"]["overall"] == pytest.approx(65)
    # the public evaluator leaves people's articles alone
    assert scores["accuracy"]["vizwiz"]["overall"] == pytest.approx(40)
    assert scores["unanswerable"] == {"predicted": 0.5, "true": 0.5}
    # by probability: true, false, true, false: (1 / 1 + 2 / 3) / 2; two are called so, one rightly
    assert scores["answerability"] == {
        "average_precision": pytest.approx(100 * 5 / 6, abs=1e-3),
        "f1": pytest.approx(50),
    }
    for answer in answers.values():
        del answer["unanswerable"]
    assert llava_vqa.score(rows, answers)["answerability"] is None


def test_upload_and_submission_are_the_recorded_ones(tmp_path, capsys):
    recording = load_fixture("llava_metric.pt")
    (tmp_path / "q.jsonl").write_text(recording["outputs"]["valid_for_llava"], encoding="utf-8")
    (tmp_path / "r.jsonl").write_text(recording["inputs"]["results_jsonl"] + '{"question_id": "valid', encoding="utf-8")
    made = ["--annotation-file", "q.jsonl", "--result-file", "r.jsonl", "--result-upload-file", "out/u.json"]
    convert_vizwiz_for_submission.main([str(tmp_path / value) if "." in value else value for value in made])
    assert "passed over 1 broken lines" in capsys.readouterr().out
    upload, submission = tmp_path / "out/u.json", tmp_path / "submission.npy"
    assert upload.read_text(encoding="utf-8") == recording["outputs"]["upload_json"]
    format_result_for_submission.main(["--result-upload-file", str(upload), "--submission-file", str(submission)])
    assert submission.read_bytes() == bytes(recording["outputs"]["submission"]["file_bytes"].tolist())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a.jpg"}]', "entry 0 must be"),
        ('{"a": 1}', "must hold a list"),
        ("[]", "there are no answers to write"),
        ('[{"answer": ', "not JSON"),
    ],
)
def test_a_bad_upload_file_is_named(tmp_path, content, message):
    (tmp_path / "u.json").write_text(content)
    argv = ["--result-upload-file", str(tmp_path / "u.json"), "--submission-file", str(tmp_path / "s.npy")]
    with pytest.raises(DataError, match=message):
        format_result_for_submission.main(argv)
    assert not (tmp_path / "s.npy").exists()


def test_a_question_without_answer_is_named(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": "a", "image": "a.jpg", "text": "?"}\n')
    (tmp_path / "r.jsonl").write_text('{"question_id": "b", "text": "x"}\n')
    argv = ["--annotation-file", tmp_path / "q.jsonl", "--result-file", tmp_path / "r.jsonl"]
    with pytest.raises(DataError, match="1 of 1 questions have no answer, the first: a"):
        convert_vizwiz_for_submission.main([*map(str, argv), "--result-upload-file", str(tmp_path / "u.json")])
    with pytest.raises(DataError, match="is an input itself"):
        convert_vizwiz_for_submission.main([*map(str, argv), "--result-upload-file", str(tmp_path / "r.jsonl")])


def test_numbered_questions_of_llavas_own_file_go_from_the_evaluation_to_the_upload(tiny, tmp_path):
    """Its llava_test.jsonl and answers files have whole numbers as ids, and a category."""
    rows = [
        row | {"question_id": number, "category": "default"}
        for number, row in enumerate(read_lines(tiny / "questions.jsonl"))
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program(*flags(tiny, tmp_path / "q.jsonl", tmp_path / "a.jsonl", "--upload-file", tmp_path / "first.json"))
    written = read_lines(tmp_path / "a.jsonl")
    assert [row["question_id"] for row in written] == list(range(len(rows)))
    expected = load_fixture("llava_tiny/expected.pt")["outputs"]["llava"]
    assert [row["text"] for row in written] == [e["text"] for e in expected]
    argv = ["--annotation-file", tmp_path / "q.jsonl", "--result-file", tmp_path / "a.jsonl"]
    convert_vizwiz_for_submission.main([*map(str, argv), "--result-upload-file", str(tmp_path / "second.json")])
    assert (tmp_path / "second.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    assert [e["image"] for e in json.loads((tmp_path / "second.json").read_text())] == [row["image"] for row in rows]


# ---- images ----


def broken_image(tiny: Path, tmp_path: Path) -> list[object]:
    """A copy of the images, of which one is no image."""
    shutil.copytree(tiny / "images", tmp_path / "images")
    (tmp_path / "images/valid_00001.png").write_bytes(b"no image")
    return ["--image-folder", tmp_path / "images"]


def test_broken_images_are_named_or_replaced(tiny, asked, tmp_path, whole, capsys):
    more = broken_image(tiny, tmp_path)
    code, line = failure(capsys, flags(tiny, asked, tmp_path / "a.jsonl", *more), program)
    assert code == 2
    assert re.search(r"question 2 \(q1\): .*valid_00001\.png: .*from the data file that names it", line), line
    assert not (tmp_path / "a.jsonl").exists()
    program(*flags(tiny, asked, tmp_path / "a.jsonl", "--skip_broken_images", *more))
    assert "warning: 3 images could not be read" in capsys.readouterr().err
    usual = [json.loads(row)["text"] for row in whole.splitlines()]
    same = [text == other for text, other in zip(texts(tmp_path / "a.jsonl"), usual, strict=True)]
    assert same == [number % 3 != 1 for number in range(NUM_QUESTIONS)]


def test_numbers_that_are_not_finite_end_the_run_with_one_line(tiny, asked, tmp_path, monkeypatch, capsys):
    original = llava_vqa.normalize
    monkeypatch.setattr(llava_vqa, "normalize", lambda *arguments: original(*arguments) * float("nan"))
    for more in ((), ("--num_beams", "2"), ("--temperature", "1")):
        code, line = failure(capsys, flags(tiny, asked, tmp_path / "a.jsonl", "--batch_size", "3", *more), program)
        assert code == 1
        assert re.search(r"questions 1 to 3 of the file: .*not finite.*try bfloat16 or float32", line), line


# ---- what can be wrong ----


class Case:
    """A private copy of everything."""

    def __init__(self, tiny: Path, asked: Path, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.tiny = Path(shutil.copytree(tiny, tmp_path / "tiny"))
        self.questions = Path(shutil.copy(asked, tmp_path / "questions.jsonl"))

    def flags(self, *more: object, model: str = "llava") -> list[str]:
        return flags(self.tiny, self.questions, self.tmp / "out/answers.jsonl", *more, model=model)

    def question(self, number: int, **values: object) -> list[str]:
        """Set keys of a question; None takes one away."""
        rows = read_lines(self.questions)
        rows[number] = {key: value for key, value in (rows[number] | values).items() if value is not None}
        self.questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return self.flags()

    def config(self, folder: str, **values: object) -> None:
        path = self.tiny / folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def annotations(self, rows: list[dict]) -> list[str]:
        (self.tmp / "rows.json").write_text(json.dumps(rows))
        return self.flags("--annotations", self.tmp / "rows.json")


BAD = BadInputs()
bad = BAD.register


@pytest.mark.parametrize(
    "more", [("--temperature", "1e-6"), *[("--num_beams", "2", "--length_penalty", p) for p in ("-10", "10")]]
)
def test_the_most_that_is_taken_still_answers(tiny, asked, tmp_path, more):
    program(*flags(tiny, asked, tmp_path / "a.jsonl", "--limit_samples", "2", *more))
    assert len(texts(tmp_path / "a.jsonl")) == 2


def test_flags_of_other_ways_to_answer_are_reported(tiny, asked, tmp_path):
    drawn = ("--top_p", "0.5", "--seed", "4")
    notes = model_vqa_loader.parse_args(flags(tiny, asked, tmp_path / "a.jsonl", *drawn, "--length_penalty", "3")).notes
    assert [note.split()[0] for note in notes] == ["--top_p", "--seed", "--length_penalty"]
    for more in ((*drawn, "--temperature", "1"), ("--num_beams", "2", "--length_penalty", "3")):
        assert model_vqa_loader.parse_args(flags(tiny, asked, tmp_path / "a.jsonl", *more)).notes == []


@bad(r"mine\.npy is there and was not written by this program, or was changed since: move it away, or give --overwrite")
def a_submission_of_somebody_else(case):
    (case.tmp / "mine.npy").write_bytes(b"mine")
    return case.flags("--submission-file", case.tmp / "mine.npy")


@bad(r"1 of 3 images are not in .*images, the first: valid_00000\.png.*check --image-folder")
def missing_image(case):
    (case.tiny / "images/valid_00000.png").unlink()
    return case.flags()


@bad(r"no folder .*nowhere: give the folder of the images as --image-folder")
def missing_image_folder(case):
    return case.flags("--image-folder", case.tmp / "nowhere")


@bad(r"--conv-mode 'vicuna' is unknown: choose one of v1, vicuna_v1, llava_v1, plain, llava_llama_2")
def unknown_template(case):
    return case.flags("--conv-mode", "vicuna")


@bad(r"no model folder at .*nowhere")
def no_model(case):
    return case.flags(model="nowhere")


@bad(r"llava-lora is an adapter of llava: give its folder as --model-base")
def adapter_without_base(case):
    (case.tiny / "llava").rename(case.tiny / "elsewhere")
    return case.flags(model="llava-lora")


@bad(r"for a base of hidden_size 64, .*llava has 32: give its own base")
def base_of_another_size(case):
    case.config("llava-lora", hidden_size=64)
    return case.flags("--model-base", case.tiny / "llava", model="llava-lora")


@bad(r"has no adapter_config\.json, so it takes no base")
def base_of_a_full_model(case):
    return case.flags("--model-base", case.tiny / "llava")


@bad(r"model\.safetensors")
def corrupt_header(case):
    with open(case.tiny / "llava-hf/model.safetensors", "r+b") as file:
        file.write(b"\xff" * 8)
    return case.flags("--tokenizer", case.tiny / "llava", model="llava-hf")


@bad(r"needs the shard pytorch_model-00002-of-00002\.bin")
def missing_shard(case):
    (case.tiny / "llava/pytorch_model-00002-of-00002.bin").unlink()
    return case.flags()


@bad(r"says that model\.ghost\.weight is in pytorch_model-00001-of-00002\.bin, where it is not")
def absent_tensor(case):
    path = case.tiny / "llava/pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "pytorch_model-00001-of-00002.bin"
    path.write_text(json.dumps(index))
    return case.flags()


@bad(r"no sentencepiece model at .*tokenizer\.model")
def no_tokenizer(case):
    return case.flags(model="llava-hf")


@bad(r"is a language model without a trained projector")
def plain_language_model(case):
    path = case.tiny / "llava/config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("mm_")}
    path.write_text(json.dumps(values))
    index = case.tiny / "llava/pytorch_model.bin.index.json"
    state = {}
    for shard in sorted(case.tiny.glob("llava/*.bin")):
        state |= torch.load(shard, weights_only=True)
        shard.unlink()
    index.unlink()
    torch.save({n: v for n, v in state.items() if "mm_projector" not in n}, case.tiny / "llava/pytorch_model.bin")
    return case.flags("--vision-tower", case.tiny / "clip")


@bad(r'questions\.jsonl:3: "image" must be a text, got None')
def question_without_image(case):
    return case.question(2, image=None)


@bad(r"questions\.jsonl:10: the last line is cut off")
def question_file_cut_off(case):
    case.questions.write_bytes(case.questions.read_bytes()[:-9])
    return case.flags()


@bad(r"no such file: .*none\.jsonl: scripts/format_dataset_for_llava\.py writes it")
def no_question_file(case):
    return case.flags("--question-file", case.tmp / "none.jsonl")


@bad(r"question 5 \(q1\) has the id of question 2; answers are told apart by it")
def duplicate_id(case):
    return case.question(4, question_id="q1")


@bad(r"question 5 \(7\) has the id of question 2; answers are told apart by it")
def duplicate_number(case):
    case.question(1, question_id=7)
    return case.question(4, question_id=7)


@bad(r"question 1 \(q0\): '\.\./secret\.png' contains '\.\.'")
def image_outside(case):
    return case.question(0, image="../secret.png")


@bad(r"question 1 \(q0\): '/etc/passwd' is absolute")
def absolute_image(case):
    return case.question(0, image="/etc/passwd")


@bad(r"question 2 \(q1\) has <image> in its text, but it is put in front of each")
def image_token_in_the_text(case):
    return case.question(1, text="<image> what?")


@bad(r"question 3 \(q2\) makes a prompt of \d+ tokens, the model has room for 60")
def endless_question(case):
    case.config("llava", tokenizer_model_max_length=75)
    return case.flags()


@bad(r"the annotations lack 10 of 10 questions, the first of image valid_00000\.png: give those of the same split")
def annotations_of_other_images(case):
    return case.annotations([annotation("train_00000.jpg", ["x"] * 10)])


@bad(r"the annotations have 0 answers for image valid_00000\.jpg, scores need at least")
def annotations_without_answers(case):
    return case.annotations([{"image": f"valid_0000{number}.jpg", "question": "?"} for number in range(3)])


@bad(r"--chunk-idx 4: 10 questions in --num-chunks 4 make 4 chunks of at most 3, counted from 0")
def chunk_beyond_the_end(case):
    return case.flags("--num-chunks", "4", "--chunk-idx", "4")


@bad(r"--answers-file .*: .*a\.txt is a file, so nothing can be written below it")
def answers_below_a_file(case):
    (case.tmp / "a.txt").write_text("x")
    return case.flags("--answers-file", case.tmp / "a.txt/out/answers.jsonl")


@bad(r"--upload-file .*tiny is a folder: give a file")
def output_is_a_folder(case):
    return case.flags("--upload-file", case.tiny)


@bad(r"--answers-file .*questions\.jsonl is an input as well: give another file")
def answers_over_questions(case):
    return case.flags("--answers-file", case.questions)


@bad(r"--submission-file .* is that of --answers-file as well")
def two_outputs_in_one(case):
    return case.flags("--submission-file", case.tmp / "out/answers.jsonl")


@bad(r"a beam search draws nothing")
def drawn_beams(case):
    return case.flags("--num_beams", "2", "--temperature", "0.5")


@bad(r"float16 needs a CUDA device")
def half_precision_on_the_cpu(case):
    return case.flags("--amp", "fp16")


@bad(r"--top_p/--top-p: must be above 0, got 0")
def no_probability(case):
    return case.flags("--top_p", "0")


@bad(r"temperature must be 0 .*or at least 1e-06 and finite, got 1e-40")
def too_cold(case):
    return case.flags("--temperature", "1e-40")


@bad(r"--temperature: must be a finite number, got inf")
def too_hot(case):
    return case.flags("--temperature", "inf")


@bad(r"length_penalty must lie between -10 and 10, got -2000")
def too_strong_a_penalty(case):
    return case.flags("--num_beams", "2", "--length_penalty", "-2000")


@bad(r"--length_penalty/--length-penalty: must be a number, got nan")
def a_penalty_that_is_no_number(case):
    return case.flags("--num_beams", "2", "--length_penalty", "nan")


@bad(r"unrecognized arguments: --temprature 1 \(did you mean --temperature\?")
def misspelt_flag(case):
    return case.flags("--temprature", "1")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(name, tiny, asked, tmp_path, capsys):
    case = Case(tiny, asked, tmp_path)
    spoil, message = BAD[name]
    argv = spoil(case)
    before = tree(tmp_path)
    code, line = failure(capsys, argv, program)
    assert code == 2
    assert re.search(message, line), line
    assert tree(tmp_path) == before
