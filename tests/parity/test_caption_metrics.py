"""Caption scores against recorded ones, and against the COCO caption evaluation where it is installed.

Measured: words equal; scores within 1e-15 of the recording. METEOR is the same Java program.
"""

import importlib.util
import shutil

import pytest

from data.metrics.caption_words import caption_words
from data.metrics.captions import score_captions
from tests.parity.fixture_files import load_fixture

EXACT = 1e-9
PACKAGE_AND_JAVA = importlib.util.find_spec("pycocoevalcap") is not None and shutil.which("java") is not None
needs_package_and_java = pytest.mark.skipif(not PACKAGE_AND_JAVA, reason="needs pycocoevalcap and Java")


@pytest.fixture(scope="module")
def recording():
    return load_fixture("evaluation_captions.json")


def by_id(values):
    return {int(index): value for index, value in values.items()}


def hypotheses(recording):
    return {index: text if type(text) is str else text[0] for index, text in by_id(recording["hypotheses"]).items()}


def test_words_equal_the_recorded_ones(recording):
    for case in recording["tokenizer"]:
        assert " ".join(caption_words(case["input"])) == case["tokens"], case["input"]
    for index, texts in by_id(recording["references"]).items():
        assert [" ".join(caption_words(text)) for text in texts] == recording["tokenized_references"][str(index)]


@pytest.mark.parametrize("metric", ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"])
def test_scores_equal_the_recorded_ones(recording, metric):
    ids = recording["ids"]
    captions = {index: hypotheses(recording)[index] for index in ids}
    scores = score_captions(by_id(recording["references"]), captions, with_java="no")
    assert scores.corpus[metric] == pytest.approx(recording["corpus"][metric], abs=EXACT)
    assert list(scores.per_image[metric].values()) == pytest.approx(recording["per_image"][metric], abs=EXACT)
    one = recording["single_image"]
    alone = score_captions(
        {one["id"]: by_id(recording["references"])[one["id"]]}, {one["id"]: captions[one["id"]]}, with_java="no"
    )
    assert alone.corpus[metric] == pytest.approx(one["corpus"][metric], abs=EXACT)


@needs_package_and_java
def test_meteor_equals_the_recorded_one(recording):
    captions = {index: hypotheses(recording)[index] for index in recording["ids"]}
    scores = score_captions(by_id(recording["references"]), captions, with_java="auto")
    assert "METEOR" not in scores.skipped
    assert scores.corpus["METEOR"] == pytest.approx(recording["corpus"]["METEOR"], abs=EXACT)
    assert list(scores.per_image["METEOR"].values()) == pytest.approx(recording["per_image"]["METEOR"], abs=EXACT)


# what people and models write: numbers, times, brackets, hyphens, endings, initials, marks, other alphabets
SENTENCES = """
7-Eleven at 24/7|a 1,000-piece puzzle|the 3rd man at 5th ave.|a train at 10:30am|a man 6'2" tall
two-and-a-half men|it's 90 degrees; 25% off|the 1990's car|the '90s car|a woman's, dog's and cats' toys|mother-in-law's
he said 'hello' to her|"quoted" text|an e.g. test i.e. test etc.|J. Smith and others|www.google.com.|me@a.com
@home #fun|semi;colon a:b|1/2 3/4ths|$5 5$ €5 £5 5¢|rock & roll AT&T R&B b&b|half- eaten|- start|end -|(parenthesis)
a/b a / b and/or|isn't it. wasn't. shouldn't've|ma'am o'clock d'or l'eau o'neil y'all|I'd've|COVID-19|4x4 truck|No. 12
a.m. p.m.|U.S.|a 12-ft. long|8 ft. pole|naïve café|50/50|3.5"|hello...world|wait…what|a--b|a—b|-5 degrees|2:1|12:30:45
the ``best''|St. Mary's church|on main st|&amp; co|gonna go cannot|<br> tag </b>|what?! huh?? wow!|#1 @ 5|~ ^ * = +
letter J. The dog|letter J. A|U.S. The man|a street,half-empty|12-ft., high|wi-fi; a bus|he is at 5p.m. Mr. X.: yes
v2.0 app|rock'n'roll|_x_|**bold**|1+1|US$5|@a|#ab1|a#b|Wash. D.C.|no. 5|no. five|St.Mary's|7 1/2 ft|(555) 123-4567
:-) ok|C++ R&D|black&white|Black&White|«quoted»|½ cup|a ★ b|日本|«|.||A man riding a wave on top of a surfboard.
two dogs , one cat .
""".replace("\n", "|").split("|")


@needs_package_and_java
def test_words_and_scores_equal_those_of_the_package():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    (theirs,) = PTBTokenizer().tokenize({0: [{"caption": text} for text in SENTENCES]}).values()
    assert [" ".join(caption_words(text)) for text in SENTENCES] == theirs

    texts = [text for text in SENTENCES if caption_words(text)]
    captions = dict(enumerate(texts))
    references = {index: [texts[index - number] for number in (1, 2, 5)] + [texts[index]] for index in captions}
    references[3] = references[3][:2]
    ours = score_captions(references, captions, with_java="no")
    given = {index: [" ".join(caption_words(text)) for text in others] for index, others in references.items()}
    found = {index: [" ".join(caption_words(text))] for index, text in captions.items()}
    bleu, _ = Bleu(4).compute_score(given, found, verbose=0)
    assert [ours.corpus[f"Bleu_{order}"] for order in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-6)
    for name, scorer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        corpus, per_image = scorer.compute_score(given, found)
        assert ours.corpus[name] == pytest.approx(corpus, abs=1e-6)
        assert list(ours.per_image[name].values()) == pytest.approx(list(per_image), abs=1e-6)
