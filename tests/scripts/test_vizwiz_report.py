"""scripts/make_vizwiz_report.py: a card for every answer, scores of the course, nothing of the data runs as HTML."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.drawn_scenes import draw_splits, render_scene
from data.errors import DataError
from scripts import make_vizwiz_report
from tests.paths import ROOT

PEOPLE = {  # four, three, one and none of ten agree with the answers below
    "a": ["a red star"] * 4 + ["star"] * 6,
    "b": ["2"] * 3 + ["3"] * 7,
    "c": ["yes"] + ["no"] * 9,
    "d": ["unanswerable"] * 8 + ["<i>blurry</i>"] * 2,
}
ANSWERS = {"a": "Red star.", "b": "two", "c": "yes", "d": "<script>alert(1)</script>"}
QUESTIONS = {"a": "What is <b>this</b>?", "b": "How many?", "c": "Is it red?", "d": "What is on the label?"}


def write_answers(path: Path, answers: dict[str, str]) -> Path:
    lines = [
        {
            "question_id": name,
            "prompt": QUESTIONS.get(name, "what?") + "\nAnswer the question using a single word or phrase.",
            "text": text,
            "answer_id": name,
            "model_id": "m",
            "metadata": {},
        }
        for name, text in answers.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_rows(path: Path, **changes) -> Path:
    rows = [
        {
            "image": f"{name}.png",
            "question": QUESTIONS[name],
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in people],
        }
        | changes
        for name, people in PEOPLE.items()
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def folder(tmp_path):
    """Images, what people said, and answers."""
    noise = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    scenes = draw_splits({"train2014": 1, "val2014": len(PEOPLE), "test2015": 1}, seed=0)["val2014"]
    for name, image in zip(PEOPLE, scenes, strict=True):
        render_scene(image.scene, noise).save(tmp_path / "images" / f"{name}.png")
    write_rows(tmp_path / "rows.json")
    write_answers(tmp_path / "answers.jsonl", ANSWERS)
    return tmp_path


def flags(folder: Path, *more: str, annotations: bool = True) -> list[str]:
    argv = ["--answers", str(folder / "answers.jsonl"), "--image_folder", str(folder / "images")]
    if annotations:
        argv += ["--annotations", str(folder / "rows.json")]
    return [*argv, "--output", str(folder / "out"), *more]


def make(folder: Path, *more: str, annotations: bool = True) -> tuple[str, dict]:
    """(page, summary)."""
    make_vizwiz_report.main(flags(folder, *more, annotations=annotations))
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return page, json.loads((folder / "out" / "summary.json").read_text())


def table_of(summary: dict) -> dict[str, list[float]]:
    return {row["name"] if row["group"] != "share" else "share": row["scores"] for row in summary["rows"]}


def cards_of(page: str) -> list[str]:
    return re.findall(r"<article.*?</article>", page, flags=re.DOTALL)


def test_every_question_has_a_card_with_its_image_worst_first(folder):
    page, _ = make(folder)
    cards = cards_of(page)
    heads = [re.search(r'<p class="mark">(.*?)</p>', card)[1] for card in cards]
    assert heads == ["✗ wrong 0.0", "≈ partly right 0.3", "✓ right 0.9", "✓ right 1.0"]
    assert all('src="data:image/png;base64,' in card for card in cards)
    assert len({re.search(r"base64,([^\"]*)", card)[1] for card in cards}) == len(PEOPLE)


def test_people_are_counted_by_the_courses_rule(folder):
    page, _ = make(folder)
    right = next(card for card in cards_of(page) if "Red star." in card)
    said = re.findall(r"<li( class=\"hit\")?><span>(.*?)</span><i style=\"--share:(.*?)%\"></i><small>(.*?)<", right)
    assert said == [("", "star", "60.0", "×6"), (' class="hit"', "a red star", "40.0", "×4")]


def test_texts_of_the_data_are_escaped(folder):
    page, _ = make(folder)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2  # card and table
    assert "What is &lt;b&gt;this&lt;/b&gt;?" in page
    assert "<i>blurry" not in page
    assert "://" not in re.sub(r"data:image/[^\"]*", "", page)


def test_the_table_has_the_courses_accuracy_by_type(folder, capsys):
    _, summary = make(folder)
    assert summary["columns"] == ["Model", "“unanswerable” for all"]
    table = table_of(summary)
    assert table["all"] == pytest.approx([(1 + 0.9 + 0.3 + 0) / 4, 0.25])
    assert {name: table[name][0] for name in ("other", "number", "yes/no", "unanswerable")} == pytest.approx(
        {"other": 1.0, "number": 0.9, "yes/no": 0.3, "unanswerable": 0.0}
    )
    assert table["share"] == [0, 1]
    assert re.search(r"^all +4 +55\.0 +25\.0$", capsys.readouterr().out, flags=re.MULTILINE)


def test_types_of_the_file_win(folder):
    write_rows(folder / "rows.json", answer_type="other")
    _, summary = make(folder)
    assert [row["name"] for row in summary["rows"] if row["group"] == "answer type"] == ["other"]


def test_the_longest_and_shortest_answers_are_listed(folder, monkeypatch):
    monkeypatch.setattr(make_vizwiz_report, "NUM_TEXTS", 3)
    page, summary = make(folder)
    groups = {}
    for row in summary["answers"]:
        groups.setdefault(row["group"], []).append(row["answer"])
    by_length = sorted(ANSWERS.values(), key=len, reverse=True)
    assert groups["longest"] == by_length[:3]
    assert groups["shortest"] == by_length[:0:-1]
    assert "Red star." in re.search(r'<table class="texts">.*?</table>', page)[0]


@pytest.mark.parametrize(("shown", "groups"), [(4, 1), (3, 3)])
def test_answers_that_are_all_among_the_most_frequent_are_not_listed_again(folder, monkeypatch, shown, groups):
    monkeypatch.setattr(make_vizwiz_report, "NUM_TEXTS", shown)
    _, summary = make(folder)
    assert len({row["group"] for row in summary["answers"]}) == groups


def test_another_model_gets_a_column_and_a_line_on_each_card(folder):
    others = write_answers(folder / "frozen.jsonl", {**dict.fromkeys(ANSWERS, "no"), "b": "2"})
    page, summary = make(folder, "--compare", str(others))
    assert summary["columns"][:2] == ["Model", "frozen"]
    assert table_of(summary)["all"][1] == pytest.approx((0 + 0.9 + 1 + 0) / 4)
    kinds = [re.search(r'data-kind="(.*?)"', card)[1] for card in cards_of(page)]
    assert kinds == ["level with frozen", "worse than frozen", "level with frozen", "better than frozen"]
    assert page.count("<span>frozen:</span>") == len(ANSWERS)


def test_without_annotations_it_shows_answers_and_prompts_only(folder):
    (folder / "rows.json").unlink()
    write_answers(folder / "answers.jsonl", {**ANSWERS, "c": "Unanswerable"})
    page, summary = make(folder, annotations=False)
    cards = cards_of(page)
    assert len(cards) == len(ANSWERS)
    assert "<h2>What is &lt;b&gt;this&lt;/b&gt;?</h2>" in cards[0]  # without the line that asks for a short answer
    assert [re.search(r'data-verdict="(\w+)"', card)[1] for card in cards] == ["answered"] * 2 + [
        "unanswerable",
        "answered",
    ]
    assert 'class="mark"' not in page
    assert table_of(summary) == {"share": [0.25]}


def number_the_questions(folder: Path) -> list[str]:
    """Answers and questions with whole numbers as ids, as LLaVA's own files of VizWiz have them."""
    rows = [
        {"question_id": number, "image": f"{name}.png", "text": f"{QUESTIONS[name]}\nAnswer the question using a "
         "single word or phrase.", "category": "default"}
        for number, name in enumerate(ANSWERS)
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_answers(folder / "answers.jsonl", dict(enumerate(ANSWERS.values())))
    return ["--questions", str(folder / "questions.jsonl")]


@pytest.mark.parametrize("annotations", [True, False])
def test_numbered_questions_have_their_images_from_the_question_file(folder, annotations):
    usual, _ = make(folder, annotations=annotations)
    write_answers(folder / "answers.jsonl", dict(enumerate(ANSWERS.values())))
    with pytest.raises(DataError, match="--questions|without an answer"):
        make(folder, annotations=annotations)
    page, _ = make(folder, *number_the_questions(folder), annotations=annotations)
    pictures = [re.search(r"base64,([^\"]*)", card)[1] for card in cards_of(page)]
    assert pictures == [re.search(r"base64,([^\"]*)", card)[1] for card in cards_of(usual)]
    assert "<h2>What is &lt;b&gt;this&lt;/b&gt;?</h2>" in page
    assert ('class="mark"' in page) == annotations


def test_questions_of_ones_own_are_told_by_their_ids(folder):
    rows = [
        {"image": "a.png", "question": QUESTIONS[name], "answers": people, "question_id": number}
        for number, (name, people) in enumerate(PEOPLE.items())
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_answers(folder / "answers.jsonl", dict(enumerate(ANSWERS.values())))
    page, summary = make(folder, "--annotations", str(folder / "rows.jsonl"))
    assert table_of(summary)["all"] == pytest.approx([(1 + 0.9 + 0.3 + 0) / 4, 0.25])
    assert len(cards_of(page)) == len(PEOPLE)


def test_two_questions_about_one_image_are_refused_beside_annotations_only(folder):
    more = number_the_questions(folder)
    path = folder / "questions.jsonl"
    path.write_text(path.read_text().replace("b.png", "a.png"))
    page, _ = make(folder, *more, annotations=False)
    assert len(cards_of(page)) == len(ANSWERS)
    with pytest.raises(DataError, match="has 2 questions about a, the annotations one"):
        make(folder, *more)


def test_rows_whose_answers_are_hidden_have_no_score(folder):
    rows = {"image": {"0": "b.png"}, "question": {"0": "Raw <q>?"}}
    (folder / "rows.json").write_text(json.dumps(rows))
    write_answers(folder / "answers.jsonl", {"b": "two"})
    page, summary = make(folder)
    assert "<h2>Raw &lt;q&gt;?</h2>" in page
    assert table_of(summary) == {"share": [0]}


def test_only_the_worst_are_shown_on_request(folder):
    page, _ = make(folder, "--worst", "--max_cards", "2")
    assert [re.search(r'data-verdict="(.*?)"', card)[1] for card in cards_of(page)] == ["wrong", "partly right"]
    assert "the 2 lowest scores of 4 questions" in page


def test_a_draw_says_so_and_depends_on_the_seed(folder):
    pages = [make(folder, "--max_cards", "2", "--seed", str(seed))[0] for seed in (0, 0, 1, 2, 3)]
    assert all(len(cards_of(page)) == 2 for page in pages)
    assert pages[0] == pages[1]
    assert len({tuple(cards_of(page)) for page in pages}) > 1
    assert "2 of 4 questions, drawn with seed 0" in pages[0]


def test_the_last_of_several_answers_counts_and_a_broken_line_is_left_out(folder, capsys):
    with open(folder / "answers.jsonl", "a") as handle:
        handle.write(json.dumps({"question_id": "d", "prompt": "p", "text": "unanswerable"}) + '\n{"question_id": "a')
    _, summary = make(folder)
    assert table_of(summary)["unanswerable"][0] == 1
    assert "left out 1 broken lines" in capsys.readouterr().out


def test_a_run_gives_the_loss_curve(folder, capsys):
    run = folder / "run"
    run.mkdir()
    page, _ = make(folder, "--run", str(run))
    assert 'class="curves"' not in page
    assert "no log.txt" in capsys.readouterr().out
    (run / "log.txt").write_text('{"epoch": 0, "train_loss": 1.5}\n')
    (run / "metrics.jsonl").write_text('{"epoch": 0, "step": 1, "loss": 2.0}\n{"epoch": 0, "step": 2, "loss": 1.0}\n')
    page, _ = make(folder, "--run", str(run))
    assert 'class="curves"' in page
    assert (folder / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_accuracy_of_a_run_is_drawn_as_the_percent_that_it_is(folder, monkeypatch):
    run = folder / "run"
    run.mkdir()
    rows = [{"epoch": epoch, "train_loss": 1.5, "val_accuracy": score} for epoch, score in enumerate((0.5, 0.9))]
    (run / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.annotate", lambda self, text, *place, **style: drawn.append(text))
    make(folder, "--run", str(run))
    assert drawn == ["best 0.9"]


# --- what is refused --------------------------------------------------------------------------------------------------


def answers_without_c(folder):
    write_answers(folder / "answers.jsonl", {name: text for name, text in ANSWERS.items() if name != "c"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (answers_without_c, "leaves 1 of 4 questions of .*rows.json without an answer, the first: c"),
        (lambda f: write_answers(f / "answers.jsonl", {**ANSWERS, "e": "x"}), "answers 1 questions .* the first: e"),
        (lambda f: (f / "answers.jsonl").write_text(""), "has no answers: run the evaluation first"),
        (lambda f: (f / "answers.jsonl").unlink(), "cannot read the answers"),
        (
            lambda f: (f / "answers.jsonl").write_text('{"question_id": 1}\n'),
            'jsonl:1: "text" must be a text, got None',
        ),
        (lambda f: write_rows(f / "rows.json", image="../a.png"), r"'\.\./a.png' contains '\.\.'"),
        (lambda f: write_rows(f / "rows.json", answers=[{"answer": "x"}]), "compares at least"),
        (lambda f: (f / "images" / "b.png").unlink(), "1 of 4 images are missing, the first: .*b.png"),
        (lambda f: (f / "images" / "b.png").write_bytes(b"text"), "cannot show .*b.png"),
        (lambda f: (f / "out").write_text(""), "a file, not a folder"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(folder, change, message):
    change(folder)
    with pytest.raises(DataError, match=message):
        make(folder)
    assert not (folder / "out" / "report.html").exists()


@pytest.mark.parametrize("name", ["../a", "/etc/passwd"])
def test_a_question_id_that_leaves_the_image_folder_is_refused(folder, name):
    write_answers(folder / "answers.jsonl", {name: "x"})
    with pytest.raises(DataError, match="question_id: .*(contains '..'|is absolute)"):
        make(folder, annotations=False)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--compare_name", "x"], "give both or none"),
        (["--compare", "nothing.jsonl"], "cannot read the answers nothing.jsonl"),
        (["--run", "nowhere"], "--run nowhere: no such folder"),
    ],
)
def test_flags_that_do_not_fit_are_refused(folder, more, message):
    with pytest.raises(DataError, match=message):
        make(folder, *more)


def test_the_worst_need_scores(folder):
    with pytest.raises(DataError, match="--worst needs scores"):
        make(folder, "--worst", annotations=False)


def test_as_a_process_it_ends_with_2_and_one_line(folder):
    answers_without_c(folder)
    command = [sys.executable, "scripts/make_vizwiz_report.py", *flags(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("make_vizwiz_report.py: error: ")
