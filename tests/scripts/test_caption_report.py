"""scripts/make_caption_report.py: the page, the table and the numbers of a captioning run."""

import json
import re
import shutil

import pytest

from data import caption_references
from data.caption_references import CaptionReferences
from data.errors import DataError
from scripts import make_caption_report
from scripts.report import curves
from scripts.report.caption_page import render_page
from scripts.report.caption_priors import best_constant_caption
from tests.scripts.caption_run import NUM_VAL, caption_data, eval_flags, trained_captioner
from tests.scripts.vqa_run import program, read_lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with an evaluation of val in it."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("log.txt", "metrics.jsonl"):
        shutil.copy(trained_captioner() / name, folder)
    program(*eval_flags(trained_captioner() / "checkpoint-best", folder, "--eval_split", "val"))
    return folder


def test_the_report_has_scores_of_model_and_constant_and_every_image(run, tmp_path, capsys):
    captions = run / "captions_coco_captioning_val.jsonl"
    argv = ["--run", str(run), "--data_path", str(caption_data()), "--before", str(captions)]
    make_caption_report.main([*argv, "--output", str(tmp_path / "out"), "--title", "A <title>"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["columns"] == ["Model", "Before training", "One caption for all"]
    rows = {row["name"]: row["scores"] for row in summary["rows"]}
    result = json.loads((run / "result_coco_captioning_val.json").read_text())
    assert rows["CIDEr"][0] == rows["CIDEr"][1] == pytest.approx(result["CIDEr"])
    assert rows["CIDEr"][2] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<article") == NUM_VAL
    assert "A &lt;title&gt;" in page
    assert "://" not in re.sub(r"data:image/[^\"]*", "", page)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "One caption for all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("which", "end"),
    [
        (["--split", "val"], ""),
        (["--split", "test"], " of test"),
        (["--split", "val", "--task", "nocaps"], " of NoCaps val"),
    ],
)
def test_the_level_of_another_split_than_the_curve_says_so(run, tmp_path, monkeypatch, which, end):
    drawn = {}
    monkeypatch.setattr(curves, "draw_curves", lambda log, **options: drawn.update(options) or b"")
    rows = read_lines(run / "captions_coco_captioning_val.jsonl")
    references = CaptionReferences({row["image_id"]: ("a red star",) for row in rows}, {})
    monkeypatch.setattr(caption_references, "read_caption_references", lambda *_: references)
    argv = ["--run", str(run), "--data_path", str(caption_data()), "--output", str(tmp_path / "out"), *which]
    captions = run / "captions_coco_captioning_val.jsonl"
    make_caption_report.main([*argv, "--predictions", str(captions)])
    assert list(drawn["levels"]) == [f"one caption for all{end}"]


def test_captions_come_worst_first_in_three_parts():
    image = (caption_data() / "val2014").iterdir().__next__().read_bytes()
    rows = [
        {"image": image, "caption": f"c{value}", "references": ["<b>"], "cider": float(value), "domain": "near-domain"}
        for value in (3, 1, 2)
    ]
    page = render_page(rows, title="t", columns=["Model"], table=[])
    assert re.findall(r"<h2>(c\d)</h2>", page) == ["c1", "c2", "c3"]
    assert re.findall(r'data-verdict="(\w+ third)" data-type', page) == ["worst third", "middle third", "best third"]
    assert "<li><span>&lt;b&gt;</span></li>" in page


def test_the_constant_caption_is_the_one_that_fits_most_images():
    references = {0: ["a red star"], 1: ["a red star here"], 2: ["two blue circles"]}
    train = ["two blue circles"] * 3 + ["a red star"] * 2 + ["nothing"]
    assert best_constant_caption(train, references) == "a red star"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[0].pop("caption"), 'record 1 needs "image", "image_id" and "caption"'),
        (lambda rows: rows.append(rows[0]), "stands twice"),
        (lambda rows: rows[0].update(image_id=999999), "captions image 999999, which has no reference captions"),
        (lambda rows: rows[0].update(image="../x.jpg"), "x.jpg"),
    ],
)
def test_captions_that_do_not_fit_are_refused(run, tmp_path, change, message):
    rows = read_lines(run / "captions_coco_captioning_val.jsonl")
    change(rows)
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--run", str(run), "--data_path", str(caption_data()), "--predictions", str(tmp_path / "captions.jsonl")]
    with pytest.raises(DataError, match=message):
        make_caption_report.main([*argv, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
