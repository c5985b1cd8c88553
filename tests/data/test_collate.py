import torch

from data.collate import pad_tokens


def test_rows_are_padded_on_the_right_to_the_longest_and_the_mask_is_1_where_padded():
    tokens, mask = pad_tokens([[0, 5, 2], [0, 2]], pad_id=1)
    assert tokens.tolist() == [[0, 5, 2], [0, 2, 1]]
    assert mask.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert tokens.dtype == mask.dtype == torch.int64


def test_equal_lengths_need_no_mask():
    tokens, mask = pad_tokens([[0, 5, 2], [0, 6, 2]], pad_id=1)
    assert tokens.shape == (2, 3)
    assert mask is None


def test_a_real_token_with_the_padding_s_id_is_not_masked():
    _, mask = pad_tokens([[0, 1, 2], [0, 2]], pad_id=1)
    assert mask.tolist() == [[0, 0, 0], [0, 0, 1]]


def test_lengths_are_rounded_up_to_a_multiple():
    tokens, mask = pad_tokens([[0, 5, 2]], pad_id=1, multiple_of=8)
    assert tokens.tolist() == [[0, 5, 2, 1, 1, 1, 1, 1]]
    assert mask.sum() == 5
    assert pad_tokens([[7] * 8], pad_id=1, multiple_of=8)[1] is None
