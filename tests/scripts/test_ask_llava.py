"""scripts/ask.py with LLaVA: the recorded answers from folders of every kind, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.errors import DataError
from data.llava_conversation import TEMPLATES
from data.vizwiz import SUFFIX
from engine.errors import RunError
from engine.weights import read_state_dict
from models.llava.llava import LlavaForCausalLM
from scripts import ask, ask_llava
from tests.parity.fixture_files import fixture_path
from tests.paths import ROOT


@pytest.fixture(scope="module")
def tiny() -> Path:
    return fixture_path("llava_tiny")


@pytest.fixture
def folders(tiny, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(tiny, tmp_path / "tiny")


def argv(tiny: Path, kind: str, *more: str, image: str = "valid_00001.png") -> list[str]:
    return ["--checkpoint", str(tiny / kind), "--image", str(tiny / "images" / image), "--device", "cpu", *more]


def answers(capsys, *args: str) -> list[str]:
    """What the program answers to the questions of ``args``."""
    capsys.readouterr()
    ask.main([*args, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line.keys() == {"question", "answer"} for line in lines)
    return [line["answer"] for line in lines]


@pytest.mark.parametrize(
    ("kind", "recorded", "more"),
    [
        ("llava", "llava", []),
        ("llava-hf", "llava", ["--sentencepiece_model"]),
        ("llava-lora", "lora", []),
        ("llava-lora", "lora", ["--model_base"]),
    ],
)
def test_each_kind_of_folder_gives_the_recorded_answers(tiny, capsys, kind, recorded, more):
    expected = torch.load(tiny / "expected.pt", weights_only=True)["outputs"][recorded]
    questions = [json.loads(line) for line in (tiny / "questions.jsonl").read_text().splitlines()]
    more = [*more, str(tiny / "llava")] if more else []
    for question, answer in zip(questions, expected, strict=True):
        asked = argv(tiny, kind, "--question", question["text"], "--max_new_tokens", "16", image=question["image"])
        assert answers(capsys, *asked, *more) == [answer["text"]]


def test_the_kind_is_told_by_content_whatever_the_folders_name(folders, capsys):
    for kind, name in (("llava", "plain"), ("llava-lora", "mine")):
        (folders / kind).rename(folders / name)
    base = ["--model_base", str(folders / "plain"), "--max_new_tokens", "2"]
    full = answers(capsys, *argv(folders, "plain", "--question", "why?", *base[2:]))
    assert full != answers(capsys, *argv(folders, "mine", "--question", "why?", *base))


def test_several_questions_share_the_image_features(tiny, capsys, monkeypatch):
    calls = []
    real = LlavaForCausalLM.tower_features
    monkeypatch.setattr(LlavaForCausalLM, "tower_features", lambda *args: calls.append(1) or real(*args))
    short = ("--max_new_tokens", "4")
    together = answers(capsys, *argv(tiny, "llava", "--question", "why?", "what color is it?", *short))
    assert len(calls) == 1
    alone = [
        answers(capsys, *argv(tiny, "llava", "--question", question, *short))
        for question in ("why?", "what color is it?")
    ]
    assert [[answer] for answer in together] == alone
    assert together[0] != together[1]


def test_flags_reach_the_prompt_and_the_decoding(tiny, capsys):
    def asked(*more):
        return answers(capsys, *argv(tiny, "llava", "--question", "what color?", "--max_new_tokens", "8", *more))

    plain = asked()
    assert asked("--num_beams", "1") == plain
    others = [asked(*more) for more in (["--num_beams", "4"], ["--conv_mode", "llava_llama_2"], ["--vizwiz_prompt"])]
    assert plain not in others
    assert asked("--prompt_suffix", SUFFIX.removeprefix("\n")) == others[2]
    assert len(asked("--max_new_tokens", "1")[0]) < len(plain[0])


def test_the_prompt_is_that_of_the_original():
    assert ask_llava.prompt_of("why?", TEMPLATES["vicuna_v1"], "\nShort.") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nwhy?\nShort. ASSISTANT:"
    )


def test_without_json_the_question_stands_above_its_answer(tiny, capsys):
    ask.main(argv(tiny, "llava", "--question", "why?", "--max_new_tokens", "2"))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "why?"
    assert second.startswith("    ")
    assert second.strip()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(folders):
    """A folder whose weights are broken: whoever reads them fails with another error."""
    for path in (folders / "llava").glob("*.bin"):
        path.write_bytes(b"")
    return folders


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "answers questions: give --question"),
        (["--question", "what?", " "], "--question ' ' is empty"),
        (["--question", "what is <image>?"], "--question .* contains <image>: leave it out"),
        (["--question", "\ud83d"], "is no proper text"),
        (["--question", "what?", "--conv_mode", "v7"], "--conv_mode must be one of v1, vicuna_v1, .* got 'v7'"),
        (["--question", "what?", "--prompt_suffix", "<image>"], "--prompt_suffix contains <image>"),
        (["--question", "what?", "--model_base", "x"], "has no adapter_config.json, so it takes no base"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(no_weights, more, message):
    with pytest.raises(DataError, match=message):
        ask.main(argv(no_weights, "llava", *more))


def test_a_missing_picture_is_named(no_weights):
    with pytest.raises(DataError, match="^--image .*nothing.png: No such file"):
        ask.main(argv(no_weights, "llava", "--question", "what?", image="nothing.png"))


def test_an_adapter_without_its_base_is_refused(folders):
    (folders / "llava").rename(folders / "elsewhere")
    with pytest.raises(DataError, match="is an adapter of llava: give its folder as --model-base"):
        ask.main(argv(folders, "llava-lora", "--question", "what?"))


def test_a_folder_without_tokenizer_says_which_flag_to_give(tiny):
    with pytest.raises(DataError, match="has no tokenizer.model: .* --sentencepiece_model"):
        ask.main(argv(tiny, "llava-hf", "--question", "what?"))


def test_a_language_model_alone_is_refused(folders):
    values = json.loads((folders / "llava/config.json").read_text())
    values = {key: value for key, value in values.items() if not key.startswith("mm_")} | {"model_type": "llama"}
    (folders / "llava/config.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="has learnt no image"):
        ask.main(argv(folders, "llava", "--question", "what?"))


def test_a_question_that_leaves_no_room_is_refused(tiny):
    with pytest.raises(DataError, match=r"--question: number 2 takes \d+ places"):
        ask.main(argv(tiny, "llava", "--question", "a", "b " * 3000, "--max_new_tokens", "2000"))


def test_a_projector_and_damaged_weights_are_named(folders):
    state = read_state_dict(folders / "llava")
    state["lm_head.weight"] = state["lm_head.weight"] * float("nan")
    (folders / "stage1").mkdir()
    shutil.copy(folders / "llava/config.json", folders / "stage1")
    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, folders / "stage1/mm_projector.bin")
    with pytest.raises(DataError, match=r"stage1 holds a projector \(mm_projector.bin\), no model"):
        ask.main(argv(folders, "stage1", "--question", "why?"))
    for path in (folders / "llava").glob("pytorch_model*"):
        path.unlink()
    torch.save(state, folders / "llava/pytorch_model.bin")
    with pytest.raises(RunError, match="not finite numbers: .*try --dtype bfloat16 or float32"):
        ask.main(argv(folders, "llava", "--question", "why?"))


def test_flags_of_llava_are_refused_elsewhere(tiny):
    with pytest.raises(DataError, match="--vizwiz_prompt is for folders of LLaVA"):
        ask.main(argv(tiny, "clip", "--question", "what?", "--vizwiz_prompt"))


def test_as_a_process_it_ends_with_2_and_one_line(tiny):
    command = [sys.executable, "scripts/ask.py", *argv(tiny, "llava", "--question", "is <image> it?")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("ask.py: error: --question")
