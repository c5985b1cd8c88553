import io
import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest
import sentencepiece
from PIL import Image

from data.errors import DataError
from data.metrics.vqa import vqa_accuracy
from scripts import draw_scenes, make_report, train_sentencepiece
from scripts.program import run
from scripts.report import curves, priors
from scripts.report.prediction_page import render_page, verdict

EVIL = "<script>alert(1)</script>\"' onload=x & </style>"


def record(question_id, answer, answer_type="other", question_type="what"):
    return {
        "question_id": question_id,
        "answer_type": answer_type,
        "question_type": question_type,
        "multiple_choice_answer": answer,
        "answers": [{"answer": answer}] * 10,
    }


def jpeg(width=96, height=96, noise=False):
    picture = (
        Image.effect_noise((width, height), 90).convert("RGB") if noise else Image.new("RGB", (width, height), "red")
    )
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=95)
    return content.getvalue()


def row(**changes):
    return {
        "image": jpeg(),
        "question": "what color is the star?",
        "prediction": "red",
        "top": [("red", 0.9), ("blue", 0.05)],
        "truth": "red",
        "answers": ["red"] * 9 + ["blue"],
        "score": 1.0,
        "answer_type": "other",
        "kind": "color",
        **changes,
    }


def page(rows, **changes):
    table = [{"name": "all", "group": "overall", "count": len(rows), "scores": [0.926, None]}]
    return render_page(rows, **{"title": "Page", "columns": ["Model", "Prior"], "table": table, **changes})


class Elements(HTMLParser):
    """Collects the tags and attributes that a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


# --- priors ---


def test_most_frequent_answer_is_the_same_for_every_question():
    train = [record(1, "yes"), record(2, "red"), record(3, "yes")]
    assert priors.most_frequent_answer(train, [record(8, "x"), record(9, "x")]) == {8: "yes", 9: "yes"}


def test_most_frequent_answer_takes_the_first_of_a_tie():
    assert priors.most_frequent_answer([record(1, "b"), record(2, "a")], [record(9, "x")]) == {9: "b"}


def test_most_frequent_per_answer_type_looks_at_questions_of_the_type():
    train = [record(1, "yes", "yes/no"), record(2, "yes", "yes/no"), record(3, "2", "number")]
    assert priors.most_frequent_per_answer_type(train, [record(9, "x", "number")]) == {9: "2"}


def test_question_only_prior_uses_the_exact_text_then_the_type_then_everything():
    train = [record(1, "yes"), record(2, "red"), record(3, "red"), record(4, "no", question_type="is")]
    asked = [record(7, "x"), record(8, "x"), record(9, "x", question_type="why")]
    texts = {1: "what?", 2: "what color?", 3: "what hue?", 4: "is it?", 7: " What? ", 8: "what size?", 9: "why?"}
    assert priors.question_only_prior(train, asked, texts) == {7: "yes", 8: "red", 9: "red"}


def test_priors_do_not_read_the_answers_they_predict():
    train = [record(1, "yes"), record(2, "no")]
    texts = {1: "a", 2: "b", 9: "b"}
    one, other = ([record(9, answer)] for answer in ("yes", "no"))
    assert priors.question_only_prior(train, one, texts) == priors.question_only_prior(train, other, texts)


# --- curves ---


def write_run(folder, log, metrics=""):
    (folder / "log.txt").write_text(log)
    if metrics:
        (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_the_last_line_of_a_repeated_epoch_counts(tmp_path):
    log = '{"epoch": 0, "val_score": 0.1}\n{"epoch": 1, "val_score": 0.2}\n{"epoch": 1, "val_score": 0.3}\n'
    assert curves.read_run_log(write_run(tmp_path, log)).series("val_score") == ([1, 2], [0.1, 0.3])


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    assert curves.read_run_log(write_run(tmp_path, '{"epoch": 0}\n{"epoch": 1, "val')).epochs == [{"epoch": 0}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    with pytest.raises(DataError, match=r"log\.txt:1 is not JSON"):
        curves.read_run_log(write_run(tmp_path, '{"epoch"\n{"epoch": 1}\n'))


def test_a_run_without_log_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match="--output_dir of a training run"):
        curves.read_run_log(tmp_path)


@pytest.mark.parametrize(
    ("log", "metrics"),
    [
        ('{"epoch": 0, "train_loss": 2.0, "val_score": 0.4}\n', '{"step": 1, "loss": 3.0, "extra": [1]}\n'),
        ('{"epoch": 0, "train_loss": NaN}\n{"epoch": 3, "train_loss": 1.0}\n', '{"step": 0, "loss": 1.0}\n'),
        ('{"epoch": 0}\n', ""),
        ("\n", '{"step": 5, "loss": 1.0}\n'),
    ],
)
def test_curves_are_drawn_whatever_keys_are_absent(tmp_path, log, metrics):
    content = curves.draw_curves(
        curves.read_run_log(write_run(tmp_path, log, metrics)), levels={"prior": 0.37, "shuffled": 0.4}
    )
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300


def test_the_prior_line_changes_the_picture(tmp_path):
    log = curves.read_run_log(write_run(tmp_path, '{"epoch": 0, "val_score": 0.4}\n'))
    assert curves.draw_curves(log, levels={"prior": 0.37}) != curves.draw_curves(log)


@pytest.mark.parametrize(
    ("score", "prior", "top"), [(0.5, 0.37, 100), (0.5, 1.176, 129.36), (1.5, 1.176, 165), (None, 1.176, 129.36)]
)
def test_the_axis_of_scores_reaches_above_the_curve_and_every_level(score, prior, top):
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    log = curves.RunLog([] if score is None else [{"epoch": 0, "val_CIDEr": score}], [])
    curves._draw_score(panel, log, "val_CIDEr", "CIDEr", {"prior": prior, "unknown": None}, is_percent=False)
    assert panel.get_ylim() == (0, pytest.approx(top))


@pytest.mark.parametrize(
    "percent",
    [[50, 60, 72.5], [30, 72, 72.5], [72.5, 72.5, 72.5], [72.5, 60, 50], [72.5], [10, 99, 100], [1, *range(55, 64)]],
)
def test_the_label_of_the_best_epoch_stands_clear_of_the_curve_and_inside_the_panel(percent, monkeypatch):
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    curves.draw_curves(curves.RunLog([{"epoch": i, "val_score": value / 100} for i, value in enumerate(percent)], []))
    monkeypatch.undo()
    panel = kept[0].axes[1]
    label, line = panel.texts[0].get_window_extent(), panel.lines[0]
    pyplot.close(kept[0])
    assert label.y0 > panel.transData.transform((0, max(percent)))[1]
    assert not line.get_transform().transform_path(line.get_path()).intersects_bbox(label, filled=False)
    assert panel.bbox.x0 <= label.x0
    assert label.x1 <= panel.bbox.x1
    assert label.y1 <= panel.bbox.y1


@pytest.mark.parametrize(
    ("steps", "names"), [(1, ["mean of the epoch"]), (2, ["per logging interval", "mean of the epoch"])]
)
def test_a_single_logging_interval_has_no_entry_in_the_legend(steps, names):
    from matplotlib.figure import Figure

    panel = Figure().subplots()
    intervals = [{"epoch": 0, "step": step, "loss": 1.0} for step in range(1, steps + 1)]
    curves._draw_loss(panel, curves.RunLog([{"epoch": 0, "train_loss": 1.0}], intervals))
    assert [text.get_text() for text in panel.get_legend().get_texts()] == names


def test_steps_are_placed_by_the_last_step_of_the_finished_epochs():
    log = curves.RunLog(
        epochs=[{"epoch": 0}, {"epoch": 1}],
        intervals=[
            {"step": 50, "epoch": 0},
            {"step": 100, "epoch": 0},
            {"step": 200, "epoch": 1},
            {"step": 250, "epoch": 2},
        ],
    )
    assert curves._epochs_of([(50, 1.0), (250, 1.0)], log) == [0.5, 2.5]


# --- page ---


def test_the_page_fetches_nothing():
    elements = Elements(page([row()], curves_png=b"png"))
    sources = [value for _, attributes in elements.found for key, value in attributes.items() if key in ("src", "href")]
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "default-src 'none'" in elements.of("meta")[3]["content"]
    assert not elements.of("link")


def test_texts_from_data_are_escaped_everywhere():
    changes = dict.fromkeys(("question", "prediction", "truth", "answer_type", "kind"), EVIL)
    rows = [row(**changes, top=[(EVIL, 0.9), (EVIL, 0.1)], answers=[EVIL] * 9 + [EVIL + "2"]), row()]
    table = [{"name": EVIL, "group": EVIL, "count": 1, "scores": [0.5]}]
    elements = Elements(page(rows, title=EVIL, subtitle=EVIL, columns=[EVIL], table=table))
    plain = Elements(page([row(), row(kind="shape", answer_type="number")], subtitle="x"))
    assert len(elements.of("script")) == 1
    assert Counter(tag for tag, _ in elements.found) == Counter(tag for tag, _ in plain.found) - Counter(
        {"td": 1, "th": 1}
    )
    assert elements.of("article")[0]["data-kind"] == EVIL


def test_texts_with_braces_leave_the_template_alone():
    text = page([row(question="{title} {0} {cards}")], title="{style}")
    assert "{title} {0} {cards}" in text
    assert "<h1>{style}</h1>" in text


@pytest.mark.parametrize(("score", "expected"), [(1.0, "right"), (0.9, "right"), (0.6, "partly right"), (0.0, "wrong")])
def test_a_card_says_in_words_whether_it_is_right(score, expected):
    assert verdict(score) == expected
    (article,) = Elements(page([row(score=score)])).of("article")
    assert article["data-verdict"] == expected
    assert article["class"] == expected.split()[0]


def test_a_card_shows_five_answers_with_bars_as_long_as_their_probabilities():
    text = page([row(top=[(f"answer {place}", 0.5 / (place + 1)) for place in range(7)])])
    assert re.findall(r"--share:([\d.]+)%", text) == ["50.0", "25.0", "16.7", "12.5", "10.0"]


def test_a_card_without_probabilities_shows_the_prediction():
    assert '<li class="only"><span>red</span></li>' in page([row(top=[])])


def test_the_summary_shows_per_cent_and_a_dash_for_no_value():
    text = page([row()])
    assert "<td>92.6</td>" in text
    assert "<td>–</td>" in text


def test_more_rows_than_cards_are_drawn_with_the_seed():
    rows = [row(question=f"question {place}?") for place in range(30)]
    shown = [re.findall(r"<h2>question (\d+)\?</h2>", page(rows, max_cards=10, seed=seed)) for seed in (0, 0, 1)]
    assert len(shown[0]) == 10
    assert shown[0] == shown[1] != shown[2]
    assert shown[0] == sorted(shown[0], key=int)
    assert "10 of 30 questions, drawn with seed 0" in page(rows, max_cards=10)


def test_small_pictures_are_embedded_as_they_are_and_enlarged_crisply():
    image = Elements(page([row()])).of("img")[0]
    assert image["class"] == "crisp"
    assert (image["width"], image["height"]) == ("96", "96")


def test_large_pictures_are_shrunk_until_the_page_fits():
    photo = jpeg(640, 480, noise=True)
    text = page([row(image=photo) for _ in range(60)], max_bytes=600_000)
    assert len(photo) > 100_000
    assert len(text.encode()) < 600_000
    assert "class" not in Elements(text).of("img")[0] or int(Elements(text).of("img")[0]["width"]) < 200


def test_a_broken_picture_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(jpeg()[:200])
    with pytest.raises(DataError, match=re.escape(str(path))):
        page([row(image=str(path))])


# --- programs ---


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "drawn"
    draw_scenes.main(["--output", str(folder), "--num_train", "300", "--num_val", "20", "--num_test", "20"])
    return folder


def answers_of(drawing, name="v2_mscoco_val2014_annotations.json"):
    return json.loads((drawing / "vqa" / name).read_text())["annotations"]


def make_run(folder, annotations, split="val"):
    (folder / "log.txt").write_text('{"epoch": 0, "train_loss": 1.0, "val_score": 0.5}\n')
    truth = [{"question_id": a["question_id"], "answer": a["multiple_choice_answer"]} for a in annotations]
    (folder / f"submit_vqav2_{split}.json").write_text(json.dumps(truth))
    return folder


def test_drawing_prints_priors_and_no_answer_is_rare(tmp_path, capsys):
    draw_scenes.main(["--output", str(tmp_path / "d"), "--num_train", "300", "--num_val", "30", "--num_test", "5"])
    printed = capsys.readouterr().out
    assert "1980 train and val questions, 32 different answers" in printed
    assert "without a label, because" not in printed
    assert re.search(r"question-only prior +\d\d\.\d %", printed)


def test_the_question_only_prior_of_the_drawn_data_is_at_most_forty_per_cent():
    from data.drawn_scenes import annotation_records, draw_splits, question_records

    images = draw_splits({"train2014": 3000, "val2014": 300, "test2015": 300}, seed=0)
    train, val = annotation_records(images["train2014"]), annotation_records(images["val2014"])
    texts = {r["question_id"]: r["question"] for split in images.values() for r in question_records(split)}
    assert 0.3 < vqa_accuracy(priors.question_only_prior(train, val, texts), val).overall <= 0.4


def test_drawing_twice_leaves_the_files_alone(drawing, capsys):
    times = {path: path.stat().st_mtime_ns for path in drawing.rglob("*")}
    draw_scenes.main(["--output", str(drawing), "--num_train", "300", "--num_val", "20", "--num_test", "20"])
    assert "holds this drawing already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in drawing.rglob("*")} == times


def test_another_drawing_needs_overwrite_and_then_leaves_no_old_picture(tmp_path):
    flags = ["--output", str(tmp_path / "d"), "--num_val", "2", "--num_test", "2", "--num_train"]
    draw_scenes.main([*flags, "5"])
    (tmp_path / "d" / "vqa.train.jsonl").write_text("an index of the old pictures")
    with pytest.raises(DataError, match="5 train .* --overwrite"):
        draw_scenes.main([*flags, "3"])
    draw_scenes.main([*flags, "3", "--overwrite"])
    assert len(list((tmp_path / "d" / "train2014").iterdir())) == 3
    assert not (tmp_path / "d" / "vqa.train.jsonl").exists()


def test_a_drawing_that_was_stopped_is_completed(tmp_path):
    flags = ["--output", str(tmp_path), "--num_train", "3", "--num_val", "2", "--num_test", "2"]
    draw_scenes.main(flags)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    note = json.loads((tmp_path / "drawn_scenes.json").read_text())
    (tmp_path / "drawn_scenes.json").write_text(json.dumps({**note, "complete": False}))
    next((tmp_path / "train2014").iterdir()).unlink()
    draw_scenes.main(flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_pictures_of_somebody_else_are_never_touched(tmp_path):
    (tmp_path / "train2014").mkdir()
    with pytest.raises(DataError, match="did not draw"):
        draw_scenes.main(["--output", str(tmp_path), "--overwrite"])
    assert not list((tmp_path / "train2014").iterdir())


@pytest.mark.parametrize(("split", "count"), [("val", 120), ("test", 120), ("test-dev", 30)])
def test_the_report_of_true_answers_says_so(drawing, tmp_path, capsys, split, count):
    name = "v2_mscoco_val2014_annotations.json" if split == "val" else "drawn_test2015_annotations.json"
    part = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    asked = {q["question_id"] for q in json.loads((drawing / "vqa" / part).read_text())["questions"]}
    records = [a for a in answers_of(drawing, name) if split != "test-dev" or a["question_id"] in asked]
    run_folder = make_run(tmp_path, records, split)
    make_report.main(["--run", str(run_folder), "--data_path", str(drawing), "--split", split])
    assert re.search(rf"^all +{count} +100\.0", capsys.readouterr().out, re.MULTILINE)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["columns"] == ["Model", "Question only", "Most frequent of type"]
    assert {line["group"] for line in summary["rows"]} == {"overall", "answer type", "kind"}
    assert "COCO_" not in (tmp_path / "report.html").read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_top_answers_and_the_column_of_shuffled_images(drawing, tmp_path):
    records = answers_of(drawing)
    run_folder = make_run(tmp_path, records)
    lines = [{"question_id": a["question_id"], "top": [["zebra", 0.75], ["red", 0.25]]} for a in records]
    (tmp_path / "top_answers_vqav2_val.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wrong = [{"question_id": a["question_id"], "answer": "zebra"} for a in records]
    (tmp_path / "submit_vqav2_val_shuffled_images.json").write_text(json.dumps(wrong))
    flags = ["--run", str(run_folder), "--data_path", str(drawing), "--output", str(tmp_path / "report")]
    make_report.main(flags)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    scores = dict(zip(summary["columns"], summary["rows"][0]["scores"], strict=True))
    assert (scores["Model"], scores["Shuffled images"]) == (1.0, 0.0)
    assert "zebra" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(("split", "end"), [("val", ""), ("test", " of test")])
def test_levels_of_another_split_than_the_curve_say_so(drawing, tmp_path, monkeypatch, split, end):
    name = "v2_mscoco_val2014_annotations.json" if split == "val" else "drawn_test2015_annotations.json"
    run_folder = make_run(tmp_path, answers_of(drawing, name), split)
    drawn = {}
    monkeypatch.setattr(curves, "draw_curves", lambda log, **options: drawn.update(options) or b"")
    make_report.main(["--run", str(run_folder), "--data_path", str(drawing), "--split", split])
    assert list(drawn["levels"]) == [f"question-only prior{end}", f"shuffled images{end}"]


def test_shuffled_predictions_of_another_split_are_refused(drawing, tmp_path):
    run_folder = make_run(tmp_path, answers_of(drawing))
    (tmp_path / "other.json").write_text('[{"question_id": 1, "answer": "red"}]')
    flags = ["--run", str(run_folder), "--data_path", str(drawing), "--shuffled", str(tmp_path / "other.json")]
    with pytest.raises(DataError, match=r"other\.json lacks question"):
        make_report.main(flags)


def test_a_part_of_the_split_is_scored_as_such(drawing, tmp_path, capsys):
    make_report.main(["--run", str(make_run(tmp_path, answers_of(drawing)[:7])), "--data_path", str(drawing)])
    assert "cover 7 of the 120 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("submit_vqav2_val.json", "{}", "not a result file"),
        ("submit_vqav2_val.json", '[{"question_id": 1}]', 'entry 0 needs "question_id" and "answer"'),
        ("submit_vqav2_val.json", '[{"question_id": 1, "answer": "x"}]', "check --split"),
        ("top_answers_vqav2_val.jsonl", '{"question_id": 1, "top": [["red"]]}\n', "record 1: expected"),
        ("log.txt", "[]\n", r"log\.txt:1 has no whole number"),
    ],
)
def test_a_broken_file_of_the_run_is_named(drawing, tmp_path, name, content, message):
    make_run(tmp_path, answers_of(drawing))
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        make_report.main(["--run", str(tmp_path), "--data_path", str(drawing)])
    assert name in str(error.value)


def test_missing_test_answers_lead_to_the_val_split(drawing, tmp_path):
    make_run(tmp_path, answers_of(drawing), "test")
    with pytest.raises(DataError, match="use --split val"):
        make_report.main(["--run", str(tmp_path), "--data_path", str(tmp_path), "--split", "test"])


QUESTION_FILE = "vqa/v2_OpenEnded_mscoco_train2014_questions.json"


@pytest.fixture(scope="module")
def spm(drawing, tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "beit3.spm"
    train_sentencepiece.main(["--input", str(drawing / QUESTION_FILE), "--output", str(path)])
    return path


def test_the_special_ids_are_those_of_the_published_model(spm):
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    assert [model.id_to_piece(place) for place in range(3)] == ["<unk>", "<s>", "</s>"]
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)


def test_words_of_the_drawn_questions_are_single_pieces(spm):
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    text = "is the red star above the blue circle?"
    assert [piece.strip("▁") for piece in model.encode(text, out_type=str)] == [*text.rstrip("?").split(), "?"]


def test_training_twice_gives_the_same_bytes(spm, drawing, tmp_path):
    train_sentencepiece.main(["--input", str(drawing / QUESTION_FILE), "--output", str(tmp_path / "again.spm")])
    assert (tmp_path / "again.spm").read_bytes() == spm.read_bytes()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("is the red star above the blue star?\nwhat color is the star?\n")
    return path


def test_training_never_replaces_another_model_unasked(text_file, tmp_path):
    output = tmp_path / "beit3.spm"
    output.write_bytes(b"the published one")
    argv = ["--input", str(text_file), "--output", str(output)]
    with pytest.raises(DataError, match=r"beit3\.spm exists: give --overwrite or another --output$"):
        train_sentencepiece.main(argv)
    assert output.read_bytes() == b"the published one"
    train_sentencepiece.main([*argv, "--overwrite"])
    assert sentencepiece.SentencePieceProcessor(model_file=str(output)).get_piece_size() > 3


def test_training_the_same_model_again_leaves_the_file_alone(text_file, tmp_path, capsys):
    output = tmp_path / "beit3.spm"
    argv = ["--input", str(text_file), "--output", str(output)]
    train_sentencepiece.main(argv)
    written = output.stat().st_mtime_ns
    train_sentencepiece.main(argv)
    assert "unchanged" in capsys.readouterr().out
    assert output.stat().st_mtime_ns == written


@pytest.mark.parametrize(("name", "message"), [("", "is a folder"), ("texts.txt/a.spm", r"texts\.txt is a file")])
def test_training_names_an_output_that_cannot_be_a_file(text_file, tmp_path, name, message):
    with pytest.raises(DataError, match=f"^--output .*{message}"):
        train_sentencepiece.main(["--input", str(text_file), "--output", str(tmp_path / name)])


@pytest.mark.parametrize("name", ["README.md", "README.md/data"])
def test_drawing_names_an_output_that_is_a_file(tmp_path, name):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(DataError, match=r"^--output .*README\.md is a file"):
        draw_scenes.main(["--output", str(tmp_path / name), "--num_train", "1", "--num_val", "1", "--num_test", "1"])
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_missing_run_folder_is_named_by_its_flag(drawing, tmp_path, capsys):
    make_run(tmp_path, answers_of(drawing))
    predictions = ["--predictions", str(tmp_path / "submit_vqav2_val.json")]
    with pytest.raises(DataError, match=r"^--run .*nowhere: no such folder"):
        make_report.main(["--run", str(tmp_path / "nowhere"), "--data_path", str(drawing), *predictions])
    assert capsys.readouterr().out == ""


def test_a_run_without_a_log_is_refused_before_the_table(drawing, tmp_path, capsys):
    (make_run(tmp_path, answers_of(drawing)) / "log.txt").unlink()
    with pytest.raises(DataError, match=r"no log\.txt in"):
        make_report.main(["--run", str(tmp_path), "--data_path", str(drawing)])
    assert capsys.readouterr().out == ""


def test_a_report_folder_that_is_a_file_is_named(drawing, tmp_path):
    make_run(tmp_path, answers_of(drawing))
    flags = ["--run", str(tmp_path), "--data_path", str(drawing), "--output", str(tmp_path / "log.txt")]
    with pytest.raises(DataError, match=r"^--output .*log\.txt: a file"):
        make_report.main(flags)


def test_the_vocabulary_is_at_most_as_large_as_asked(drawing, tmp_path, capsys):
    path = tmp_path / "small.spm"
    train_sentencepiece.main(["--input", str(drawing / QUESTION_FILE), "--output", str(path), "--vocab_size", "50"])
    assert sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size() == 50
    assert "50 pieces from 1800 texts" in capsys.readouterr().out


def test_texts_come_from_json_records_json_lines_and_plain_lines(tmp_path):
    (tmp_path / "a.json").write_text('[{"question": " one  a "}, {"question": ""}]')
    (tmp_path / "b.jsonl").write_text('{"question": "two"}\n\n{"captions": ["three", "four"]}\n')
    (tmp_path / "c.txt").write_text("five\n\nsix\n")
    texts = [
        text for name in ("a.json", "b.jsonl", "c.txt") for text in train_sentencepiece.read_texts(tmp_path / name)
    ]
    assert texts == ["one a", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.json", '{"images": []}', [], "a.json has no questions"),
        ("a.json", '{"questions": [{"question": 3}]}', [], 'record 0 has no "question"'),
        ("a.jsonl", '{"question": "x"}\n{"text": "y"}\n', [], r"a.jsonl:2: neither"),
        ("a.jsonl", '{"captions": [3]}\n', [], r"a.jsonl:1: neither"),
        ("a.txt", "", [], "no text to train on"),
        ("a.txt", "hello world\n", ["--vocab_size", "5"], "Vocabulary size is smaller"),
        ("a.txt", "hello world\n", ["--vocab_size", "0"], "--vocab_size 0 is too small"),
        ("a.txt", b"\xff\xfe", [], "not UTF-8"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_written(tmp_path, name, content, flags, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        train_sentencepiece.main(["--input", str(tmp_path / name), "--output", str(tmp_path / "o.spm"), *flags])
    assert not (tmp_path / "o.spm").exists()


@pytest.mark.parametrize("program", [draw_scenes, make_report, train_sentencepiece])
def test_an_input_error_is_one_line_and_exit_code_two(program, tmp_path, monkeypatch, capsys):
    missing = str(tmp_path / "missing")
    flags = {
        draw_scenes: ["--output", missing, "--num_train", "0"],
        make_report: ["--run", missing, "--data_path", missing],
        train_sentencepiece: ["--input", missing],
    }[program]
    monkeypatch.setattr(sys, "argv", ["program", *flags])
    with pytest.raises(SystemExit) as stop:
        run(program.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("program", [draw_scenes, make_report, train_sentencepiece])
def test_a_mistake_in_the_flags_is_one_line_and_exit_code_two(program, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--no_such_flag"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line
    assert line.endswith("(see --help)")
