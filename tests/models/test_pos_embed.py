import pytest
import torch
from torch.testing import assert_close

from models.errors import ModelError
from models.pos_embed import resize_pos_embed


def test_rows_before_the_patches_stay():
    table = torch.randn(3 + 16, 5)
    assert torch.equal(resize_pos_embed(table, 6, 3)[:3], table[:3])


def test_a_constant_table_stays_constant_at_any_size():
    assert_close(resize_pos_embed(torch.full((1 + 9, 4), 2.5), 7, 1), torch.full((1 + 49, 4), 2.5))


def test_the_same_size_returns_the_table_itself():
    table = torch.randn(2 + 9, 4)
    assert resize_pos_embed(table, 3, 2) is table


def test_rows_and_columns_of_the_grid_are_not_swapped():
    rows = torch.arange(4.0).repeat_interleave(4).unsqueeze(-1)  # value = row of the patch
    resized = resize_pos_embed(rows, 8, 0).view(8, 8)
    assert_close(resized, resized[:, :1].expand(8, 8))
    assert (resized[1:, 0] >= resized[:-1, 0]).all()


def test_half_precision_tables_are_resized_in_float32_and_come_back_in_half():
    table = torch.randn(1 + 16, 4)
    resized = resize_pos_embed(table.half(), 6, 1)
    assert resized.dtype == torch.float16
    assert torch.equal(resized, resize_pos_embed(table.half().float(), 6, 1).half())


@pytest.mark.parametrize("num_patches", [0, 2, 15])
def test_a_table_that_is_not_square_is_refused_with_its_numbers(num_patches: int):
    with pytest.raises(ModelError, match=rf"{num_patches + 3} rows has {num_patches} patch rows .* not a square"):
        resize_pos_embed(torch.zeros(num_patches + 3, 4), 4, 3)
