"""VL-BERT's vocabulary and answer list: what is read and what is refused."""

import pytest
import torch

from data.errors import DataError
from data.tokenizers.wordpiece import WordPieceTokenizer, basic_words
from data.vlbert_answers import AnswerList
from data.vlbert_images import pad_boxes, pad_images, target_size, transform

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "##do", "a", "!"]


def test_the_longest_piece_is_taken_first_and_a_word_that_cannot_be_covered_is_one_unknown(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    tokenizer = WordPieceTokenizer.load(path)
    assert tokenizer.vocab_size == len(VOCABULARY)
    assert tokenizer.tokenize("Undoable, [MASK] undox a!") == [
        "un",
        "##do",
        "##able",
        "[UNK]",
        "[MASK]",
        "[UNK]",
        "a",
        "!",
    ]
    assert tokenizer.encode("a" * 101) == [tokenizer.unk_id]


def test_accents_controls_and_ideographs():
    assert basic_words("Zürich\u200b caf\u00e9\u00a0猫x\t[mask]") == ["zurich", "cafe", "猫", "x", "[", "mask", "]"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (VOCABULARY[:4], r"has no \[MASK\]"),
        ([*VOCABULARY[1:], "[PAD]"], r"has \[PAD\] in line 10, it must be the first"),
    ],
)
def test_a_vocabulary_that_is_not_berts_is_refused(tmp_path, lines, message):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        WordPieceTokenizer.load(path)
    with pytest.raises(DataError, match="no vocabulary at"):
        WordPieceTokenizer.load(tmp_path / "absent.txt")


def test_an_answer_list_is_cleaned_needs_its_unknown_entry_and_the_length_of_the_config(tmp_path):
    path = tmp_path / "answers_vqa.txt"
    path.write_text("Yes \n\nt-shirt\n<unk>\nt shirt\n")
    answers = AnswerList.load(path, num_answers=4)
    assert answers.answers == ("yes", "t shirt", "<unk>", "t shirt")
    targets = answers.targets(["t shirt"] * 2 + ["yes"] * 5 + ["<unk>"] * 3)
    assert targets.tolist() == pytest.approx([1.0, 0.6, 0.0, 0.0])
    with pytest.raises(DataError, match="has 4 answers, ANSWER_VOCAB_SIZE says 3129"):
        AnswerList.load(path, num_answers=3129)
    path.write_text("yes\nno\n")
    with pytest.raises(DataError, match="has no <unk>"):
        AnswerList.load(path)


def test_an_image_of_another_size_than_its_boxes_is_refused_and_padding_is_told_apart():
    image = torch.zeros(4, 6, 3, dtype=torch.uint8).numpy()
    with pytest.raises(DataError, match="the image is 6 x 4, its boxes are of 4 x 6"):
        transform(torch.zeros(1, 4), (4, 6), image)
    assert target_size(500, 100, 600, 1000) == (1000, 200)
    batch = pad_boxes([torch.ones(1, 4), torch.ones(3, 4)])
    assert (batch[0, 1:] == -2).all()
    assert pad_images([torch.ones(3, 2, 5), torch.ones(3, 4, 1)]).shape == (2, 3, 4, 5)
