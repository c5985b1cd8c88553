"""The course baseline: the ResNet against torchvision's, the questions' words, and what is refused."""

import pytest
import torch
import torchvision

from data.baseline_vqa import build_answer_ids, build_word_ids, encode_answers, mode_targets, question_vector
from data.errors import DataError
from models.baseline import FEATURES, BaselineVQA, ResNet18
from models.errors import ModelError


def lower_without_marks(text: str) -> str:
    return text.lower().strip("?. ")


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (65, 90)])
def test_without_biases_it_is_torchvisions_resnet18(size: tuple[int, int]):
    torch.manual_seed(0)
    ours, theirs = ResNet18().eval(), torchvision.models.resnet18(num_classes=FEATURES).eval()
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        own = state.pop(name.replace("downsample", "shortcut"))
        if name.endswith(("running_mean", "bn1.bias", "bn2.bias", "downsample.1.bias")):
            value.normal_(std=0.1)
        own.copy_(value)
    for name, bias in state.items():
        assert name.endswith("bias")
        bias.zero_()
    image = torch.rand(2, 3, *size)
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-5, rtol=1e-5)


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = BaselineVQA(5, 4)
    model(torch.rand(2, 3, 64, 64), torch.ones(2, 5)).logsumexp(dim=1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("sizes", "message"), [((0, 3), "num_words .* got 0"), ((3, 0), "num_answers .* got 0")])
def test_empty_dictionaries_are_refused(sizes: tuple[int, int], message: str):
    with pytest.raises(ModelError, match=message):
        BaselineVQA(*sizes)


@pytest.mark.parametrize("shape", [(2, 6), (1, 5), (5,)])
def test_question_vectors_of_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ModelError, match=r"shape \(2, 5\), got"):
        BaselineVQA(5, 4)(torch.rand(2, 3, 32, 32), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 32, 32)])
def test_images_of_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ModelError, match=r"\(batch, 3, height, width\), got"):
        BaselineVQA(5, 4)(torch.rand(shape), torch.zeros(2, 5))


def test_words_are_numbered_by_first_appearance():
    word_ids = build_word_ids(["What is this?", "is it", "What now"], lower_without_marks)
    assert word_ids == {"what": 0, "is": 1, "this": 2, "it": 3, "now": 4}


def test_a_normalised_question_has_all_its_words_and_the_originals_has_not():
    word_ids = build_word_ids(["What is this?"], lower_without_marks)
    assert question_vector("What is this?", word_ids, lower_without_marks).tolist() == [1, 1, 1, 0]
    assert question_vector("What is this?", word_ids, lower_without_marks, reference=True).tolist() == [0, 1, 0, 1]


def test_unknown_words_share_the_last_entry():
    word_ids = build_word_ids(["is it"], lower_without_marks)
    assert question_vector("Is that new?", word_ids, lower_without_marks).tolist() == [1, 0, 1]


def test_an_empty_question_is_one_word_like_in_the_original():
    word_ids = build_word_ids(["what", "?"], lower_without_marks)
    assert word_ids == {"what": 0, "": 1}
    assert question_vector("?", word_ids, lower_without_marks).tolist() == [0, 1, 0]


def test_the_most_frequent_answer_wins_and_the_first_of_equals():
    answers = [["blue", "Red.", "red", "blue"], ["blue", "red", "Red"], ["dark red"]]
    answer_ids = build_answer_ids(answers, lower_without_marks)
    assert answer_ids == {"blue": 0, "red": 1, "dark red": 2}
    encoded = encode_answers(answers, answer_ids, lower_without_marks)
    assert encoded == [[0, 1, 1, 0], [0, 1, 1], [2]]
    targets = mode_targets(encoded)
    assert targets.dtype == torch.long
    assert targets.tolist() == [0, 1, 2]


def test_equal_counts_are_settled_by_appearance_and_not_by_number():
    assert mode_targets([[7, 3, 3, 7]]).tolist() == [7]


def test_a_question_without_answers_is_named():
    for refused in (lambda: encode_answers([["a"], []], {"a": 0}, str), lambda: mode_targets([[0], []])):
        with pytest.raises(DataError, match="question 1 .* has no answers"):
            refused()


def test_an_answer_outside_the_dictionary_is_named():
    with pytest.raises(DataError, match="answer 'Green' of question 1 .* not in the answer dictionary"):
        encode_answers([["blue"], ["Green"]], {"blue": 0}, lower_without_marks)
