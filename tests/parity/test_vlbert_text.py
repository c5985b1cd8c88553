"""VL-BERT's tokenizer and answers against recorded ones: equal."""

import pytest
import torch

from data.tokenizers.wordpiece import WordPieceTokenizer, basic_words, swap_sides
from data.vlbert_answers import AnswerList
from tests.parity.fixture_files import load_fixture


def test_words_pieces_and_ids_of_every_recorded_text():
    recording = load_fixture("vlbert_wordpiece.pt")
    outputs = recording["outputs"]
    tokenizer = WordPieceTokenizer(recording["config"].get("vocab") or recording.get("vocab") or outputs["vocab"])
    for place, text in enumerate(recording["inputs"]["strings"]):
        assert basic_words(text) == outputs["basic"][place], text
        tokens = tokenizer.tokenize(text)
        assert tokens == outputs["tokens"][place], text
        assert tokenizer.to_ids(tokens) == outputs["ids"][place]
        assert swap_sides(tokens) == outputs["flipped"][place], text


def test_answers_and_their_targets():
    recording = load_fixture("vlbert_answers.pt")
    inputs, outputs = recording["inputs"], recording["outputs"]
    answers = AnswerList(inputs["answer_vocab_raw"])
    assert list(answers.answers) == outputs["answer_vocab"]
    for said, expected in zip(inputs["answers"], outputs["soft_targets"], strict=True):
        assert torch.allclose(answers.targets(said), expected, atol=1e-6), said
    for said, flipped, expected in zip(
        inputs["answers"], outputs["flipped_answers"], outputs["flipped_soft_targets"], strict=True
    ):
        swapped = [" ".join(swap_sides(answer.split(" "))) for answer in said]
        assert swapped == flipped
        assert answers.targets(swapped).tolist() == pytest.approx(expected.tolist())
