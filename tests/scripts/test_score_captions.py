"""scripts/score_captions.py: what it prints and writes, and what it says to files that do not fit."""

import json

import pytest

from data.errors import DataError
from data.metrics import java_metrics
from scripts import score_captions

COCO = {
    "images": [
        {"id": index, "domain": domain} for index, domain in enumerate(("in-domain", "in-domain", "near-domain"))
    ],
    "annotations": [
        {"image_id": index, "caption": text}
        for index, text in ((0, "a red circle"), (0, "one circle"), (1, "two blue stars"), (2, "a cross on white"))
    ],
}
PREDICTIONS = [{"image_id": index, "caption": text} for index, text in enumerate(("a red circle.", "stars", ""))]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes both files; returns the flags."""
    monkeypatch.setattr(java_metrics, "_package_folder", lambda: None)

    def write(predictions=PREDICTIONS, annotations=COCO):
        paths = tmp_path / "predictions.json", tmp_path / "annotations.json"
        for path, content in zip(paths, (predictions, annotations), strict=True):
            path.write_text(content if type(content) is str else json.dumps(content))
        return ["--predictions", str(paths[0]), "--annotations", str(paths[1])]

    return write


def test_it_prints_a_table_with_a_column_for_each_domain_and_says_what_was_skipped(files, capsys):
    score_captions.main(files())
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == "3 images; values times 100, as in papers"
    assert lines[1].split() == ["all", "in-domain", "near-domain"]
    assert [line.split()[0] for line in lines[2:8]] == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert lines[8].startswith("METEOR skipped: METEOR needs the package")
    assert "warning: 1 captions are empty" in said.err


def test_it_writes_fractions_and_on_request_those_of_every_image(files, tmp_path, capsys):
    argv = [*files(), "--caption_metrics", "basic", "--json"]
    score_captions.main([*argv, "--output", str(tmp_path / "scores.json"), "--per_image"])
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written.pop("per_image")["ROUGE_L"]["2"] == 0.0
    assert written == printed
    assert printed["skipped"] == {}
    assert printed["domains"]["near-domain"]["images"] == 1
    assert 0 < printed["Bleu_1"] < 1


def test_partial_scores_the_images_of_both_files_and_says_how_many_are_left_out(files, capsys):
    argv = files(PREDICTIONS[:2] + [{"image_id": 9, "caption": "x"}])
    score_captions.main([*argv, "--partial", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["images"] == 2
    assert "2 images are in both files; 1 captions and 1 images with references are left out" in said.err


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (PREDICTIONS[:2], "1 of 3 images with references have no caption, the first of image 2"),
        ([*PREDICTIONS, {"image_id": 77, "caption": "x"}], "1 of 4 captions have no reference, the first of image 77"),
        ([*PREDICTIONS, PREDICTIONS[0]], "entry 3: image 0 stands twice"),
        ([{"image_id": "0", "caption": "x"}], 'entry 0 needs a whole number "image_id"'),
        ([{"image_id": 0}], 'entry 0 needs .* a text "caption"'),
        ([], "needs a non-empty list"),
        ({"0": "x"}, "needs a non-empty list"),
        ("[{", "not JSON"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(files, predictions, message):
    with pytest.raises(DataError, match=message):
        score_captions.main(files(predictions))


def test_a_list_of_images_without_captions_is_refused_as_references(files):
    with pytest.raises(DataError, match="has no captions, only a list of images"):
        score_captions.main(files(annotations={"images": COCO["images"]}))


def test_metrics_that_cannot_be_computed_are_refused_when_they_are_required(files):
    with pytest.raises(DataError, match="METEOR needs the package pycocoevalcap"):
        score_captions.main([*files(), "--caption_metrics", "all"])


def test_scores_of_each_image_want_a_file(files):
    with pytest.raises(DataError, match="--per_image needs --output FILE"):
        score_captions.main([*files(), "--per_image"])
