import math
import stat

import pytest

from data.errors import DataError
from data.metrics import java_metrics
from data.metrics.bleu import bleu
from data.metrics.caption_words import caption_words
from data.metrics.captions import check_java, format_scores, score_by_domain, score_captions
from data.metrics.cider import cider
from data.metrics.rouge import rouge_l


def words(*texts):
    return [text.split() for text in texts]


# ---- words ----


@pytest.mark.parametrize("separator", ["\n", "\r", "\r\n", "\v", "\f", "\u2028", "\u2029"])
def test_every_kind_of_line_end_is_a_space(separator):
    assert caption_words(f"a red{separator}circle") == ["a", "red", "circle"]


def test_emoji_and_punctuation_are_no_words_and_brackets_are():
    assert caption_words("a dog 🐶 (red) , . ! …") == ["a", "dog", "-lrb-", "red", "-rrb-"]


def test_a_caption_of_nothing_has_no_words():
    assert caption_words("  . \n") == []


# ---- formulas, by hand ----


def test_bleu_counts_each_word_as_often_as_one_reference_has_it():
    (first, second, *_), _ = bleu(words("the the the cat"), [words("the cat sat", "a cat")])
    assert first == pytest.approx(2 / 4)
    assert second == pytest.approx(math.sqrt(2 / 4 * 1 / 3))


def test_bleu_is_shortened_for_captions_that_are_shorter_than_the_closest_reference():
    (first, *_), _ = bleu(words("a cat"), [words("a cat sat here", "a cat sat on the mat today")])
    assert first == pytest.approx(math.exp(1 - 4 / 2))


def test_the_shorter_of_two_equally_close_references_counts():
    (first, *_), _ = bleu(words("a cat sat"), [words("a cat", "a cat sat on")])
    assert first == pytest.approx(1.0)


def test_rouge_takes_precision_and_recall_of_different_references():
    value = rouge_l("a b c".split(), words("a b c d e f", "a x"))
    precision, recall = 1.0, 0.5
    assert value == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_rouge_of_nothing_in_common_is_zero():
    assert rouge_l("a b".split(), words("c d")) == 0.0


def test_cider_of_a_caption_that_is_its_only_reference_is_ten_and_of_one_image_zero():
    captions = words("a red circle here", "two blue stars there")
    assert cider(captions, [[caption] for caption in captions]) == pytest.approx([10.0, 10.0])
    assert cider(captions[:1], [[captions[0]]]) == [0.0]


def test_cider_does_not_count_words_that_every_image_has():
    values = cider(words("common", "common"), [words("common"), words("common other")])
    assert values == [0.0, 0.0]


# ---- all together ----

REFERENCES = {1: ["a red circle", "one red circle"], 2: ["two blue stars"], 3: ["a green cross on white"]}
CAPTIONS = {1: "A red circle.", 2: "two stars", 3: ""}


def test_an_empty_caption_scores_zero_and_breaks_nothing():
    scores = score_captions(REFERENCES, CAPTIONS, with_java="no")
    assert scores.per_image["CIDEr"][3] == 0.0
    assert scores.per_image["ROUGE_L"][3] == 0.0
    assert scores.corpus["CIDEr"] == pytest.approx(sum(scores.per_image["CIDEr"].values()) / 3)


def test_domains_are_scored_by_themselves():
    domains = {1: "in-domain", 2: "in-domain", 3: "out-domain"}
    found = score_by_domain(REFERENCES, CAPTIONS, domains)
    alone = score_captions({i: REFERENCES[i] for i in (1, 2)}, {i: CAPTIONS[i] for i in (1, 2)}, with_java="no")
    assert found["in-domain"] == {"images": 2, **alone.corpus}
    assert found["out-domain"]["images"] == 1
    table = format_scores(score_captions(REFERENCES, CAPTIONS, with_java="no"), found)
    assert table.splitlines()[0].split() == ["all", "in-domain", "out-domain"]


@pytest.mark.parametrize(
    ("references", "captions", "message"),
    [
        (REFERENCES, {}, "no caption to score"),
        ({}, CAPTIONS, "3 of 3 captions have no reference, the first of image 1, 2, 3"),
        (REFERENCES, {1: "a"}, "2 of 3 images with references have no caption, the first of image 2, 3"),
        ({**REFERENCES, 3: []}, CAPTIONS, "1 of 3 captions have no reference, the first of image 3"),
    ],
)
def test_other_images_than_those_of_the_references_are_refused(references, captions, message):
    with pytest.raises(DataError, match=message):
        score_captions(references, captions, with_java="no")


# ---- Java ----


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Installs a program as ``java`` and files of a package; returns how to write the program."""
    package = tmp_path / "package"
    for name in (java_metrics._METEOR, java_metrics._SPICE, *java_metrics._SPICE_NEEDS):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    monkeypatch.setattr(java_metrics, "_package_folder", lambda: package)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")

    def install(script):
        path = bin_folder / "java"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return package

    return install


def test_without_the_package_or_java_the_others_are_scored_and_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(java_metrics, "_package_folder", lambda: None)
    scores = score_captions(REFERENCES, CAPTIONS)
    assert set(scores.skipped) == {"METEOR", "SPICE"}
    assert scores.skipped["METEOR"] == "METEOR needs the package pycocoevalcap: pip install pycocoevalcap"
    assert "CIDEr" in scores.corpus
    assert "METEOR skipped: METEOR needs the package" in format_scores(scores)


def test_java_that_is_not_there_is_named(java, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert java_metrics.why_unavailable("METEOR") == "METEOR needs Java: install a Java runtime"


def test_the_parser_that_spice_needs_is_asked_for_and_not_downloaded(java):
    package = java("exit 1")
    (package / java_metrics._SPICE_NEEDS[0]).unlink()
    assert "put stanford-corenlp-3.6.0.jar into the folder spice/lib" in java_metrics.why_unavailable("SPICE")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Exception in main' >&2; exit 3", "METEOR ended with code 3: Exception in main"),
        ("exit 1", "METEOR ended with code 1: it said nothing"),
        ("echo 1,5 2,5", "METEOR gave '1,5 2,5' instead of numbers"),
        ("echo 0.5", "METEOR gave 0 values for 3 images"),
    ],
)
def test_java_that_fails_costs_that_metric_only(java, script, reason):
    java(script)
    scores = score_captions(REFERENCES, CAPTIONS)
    assert scores.skipped["METEOR"] == reason
    assert "CIDEr" in scores.corpus
    assert "METEOR" not in scores.corpus


def test_java_that_hangs_is_ended_after_its_time(java):
    java("exec sleep 60")
    with pytest.raises(java_metrics.UnavailableError, match="METEOR took longer than 0.3 s"):
        java_metrics.meteor(words("a"), [words("a")], time_limit_s=0.3)


def test_meteor_gets_every_caption_with_its_references_in_english(java, tmp_path):
    java(f'echo "$@" >> {tmp_path}/arguments; cat > {tmp_path}/given; echo 0.25 0.75 0.5')
    total, per_image = java_metrics.meteor(words("a cat", "x ||| y"), [words("a dog", "cat"), words("y")])
    assert (total, per_image) == (0.5, [0.25, 0.75])
    assert (tmp_path / "given").read_text() == "EVAL ||| 0.25 0.75 0.5\n"  # the second run's
    assert "-Duser.language=en" in (tmp_path / "arguments").read_text()


def test_spice_reads_the_measure_of_each_image(java, tmp_path):
    rows = '[{"image_id": 1, "scores": {"All": {"f": 0.25}}}, {"image_id": 0, "scores": {"All": {"f": 0.75}}}]'
    java(f'while [ $# -gt 1 ]; do [ "$1" != -out ] || echo \'{rows}\' > "$2"; shift; done')
    assert java_metrics.spice(["a", "b"], [["a"], ["b", "c"]]) == (0.5, [0.75, 0.25])


def test_metrics_that_are_required_are_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(java_metrics, "_package_folder", lambda: None)
    with pytest.raises(DataError, match="METEOR needs the package pycocoevalcap.*leave out --caption_metrics all"):
        check_java("require")
    check_java("auto")
