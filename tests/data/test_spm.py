import pytest
import sentencepiece
import torch

from data.errors import DataError
from data.tokenizers.spm import XLMRTokenizer
from tests.data.vqav2_tree import SPM
from tests.helpers import sent_to_a_process


@pytest.fixture(scope="module")
def tokenizer():
    return XLMRTokenizer(SPM)


@pytest.fixture(scope="module")
def reference():
    return sentencepiece.SentencePieceProcessor(model_file=str(SPM))


@pytest.mark.parametrize(
    "text",
    [
        "A red circle.",
        "  many   spaces\t",
        "Größe 你好 😀 ½",
        "ＦＵＬＬ",
        "a\u200bb\ufeff",
        "a < b > c",
        "<Mask>",
        "a\0b",
    ],
)
def test_ids_are_sentencepiece_ids_shifted_by_one_with_unknown_at_three(tokenizer, reference, text):
    pieces = reference.encode(text)
    assert tokenizer.encode(text) == [3 if piece == 0 else piece + 1 for piece in pieces]


def test_sizes_follow_the_model_file(tokenizer, reference):
    assert tokenizer.vocab_size == reference.get_piece_size() + 2
    assert tokenizer.mask_id == tokenizer.vocab_size - 1


def test_a_literal_special_becomes_its_id_and_eats_the_space_around_it(tokenizer):
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("a <mask>  b") == a + [tokenizer.mask_id] + b
    assert tokenizer.encode("<s><pad></s><unk>") == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u200b"])
def test_white_space_has_no_tokens(tokenizer, text):
    assert tokenizer.encode(text) == []


def test_half_a_surrogate_pair_is_an_input_error(tokenizer):
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a \ud83d b")


def test_decode_inverts_encode_for_known_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode("the red circle is above a square")) == "the red circle is above a square"


def test_decode_drops_specials_and_ids_without_text(tokenizer):
    ids = [
        0,
        *tokenizer.encode("a circle"),
        tokenizer.mask_id,
        3,
        tokenizer.vocab_size,
        tokenizer.vocab_size + 8,
        2,
        1,
        1,
    ]
    assert tokenizer.decode(ids) == "a circle"
    assert tokenizer.decode(torch.tensor(ids)) == "a circle"


def test_clean_up_tightens_spacing_in_the_reference_order(tokenizer):
    ids = tokenizer.encode("a circle , a square .")
    assert tokenizer.decode(ids) == "a circle, a square."
    assert tokenizer.decode(ids, clean_up=False) == "a circle , a square ."


def test_segment_is_cut_to_the_maximal_length(tokenizer):
    assert tokenizer.build_segment([5, 6], 8) == [0, 5, 6, 2]
    assert tokenizer.build_segment(list(range(10, 30)), 8) == [0, 10, 11, 12, 13, 14, 15, 2]


def test_segment_of_nothing_or_without_room_is_an_error(tokenizer):
    with pytest.raises(DataError, match="no tokens"):
        tokenizer.build_segment([], 8)
    with pytest.raises(DataError, match="at least 3 .* got 2"):
        tokenizer.build_segment([5], 2)


def test_a_tokenizer_in_another_process_gives_equal_ids(tokenizer):
    copy = sent_to_a_process(tokenizer)
    text = "a red circle <mask> 😀"
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.decode(copy.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert copy.vocab_size == tokenizer.vocab_size


def test_a_missing_model_file_names_the_way_out(tmp_path):
    with pytest.raises(DataError, match="absent.spm .*give --sentencepiece_model PATH; beit3.spm comes with"):
        XLMRTokenizer(tmp_path / "absent.spm")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", SPM.read_bytes()[:-1000]])
def test_a_broken_model_file_names_the_way_out(tmp_path, content):
    (tmp_path / "broken.spm").write_bytes(content)
    with pytest.raises(DataError, match="broken.spm is not a whole sentencepiece model .*--sentencepiece_model"):
        XLMRTokenizer(tmp_path / "broken.spm")


def test_a_model_with_other_special_ids_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "is the square above a circle", "how many stars are there"]),
        model_prefix=str(tmp_path / "other"),
        vocab_size=32,
        pad_id=0,
        unk_id=3,
        bos_id=1,
        eos_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DataError, match=r"numbers <unk>, <s>, </s> as \(3, 1, 2\)"):
        XLMRTokenizer(tmp_path / "other.model")
