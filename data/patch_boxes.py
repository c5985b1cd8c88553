"""Boxes of a picture -> the patches that they cover, and object tags of words -> the boxes that are added (VLE).

Departure: an empty box of the reference (one that begins beyond the right or bottom edge) is the last column or row.
"""

from collections.abc import Sequence


def box_to_patches(
    box: Sequence[float], *, width: int, height: int, image_size: int, patch_size: int
) -> tuple[list[int], list[float]]:
    """Patches of one box, row by row from 0, and the box snapped to the grid.

    As in the reference the box lies on the whole picture: the centre crop is not taken into account.

    Args:
        box: x1, y1, x2, y2 in pixels of the picture; further values are ignored.
        width: of the picture.
        height: of the picture.
        image_size: side of the model's input.
        patch_size: side of a patch.
    """
    grid = image_size // patch_size
    columns, rows = (
        _cells(box[axis], box[axis + 2], cell=side / grid, grid=grid) for axis, side in ((0, width), (1, height))
    )
    patches = [row * grid + column for row in range(*rows) for column in range(*columns)]
    cell_width, cell_height = width / grid, height / grid
    snapped = [columns[0] * cell_width, rows[0] * cell_height, columns[1] * cell_width, rows[1] * cell_height]
    return patches, snapped


def _cells(first: float, last: float, *, cell: float, grid: int) -> tuple[int, int]:
    start = min(max(int(first // cell), 0), grid - 1)
    end = int(last // cell) + 1
    return start, min(max(end, start + 1), grid)


def tags_to_token_types(object_tags: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Which boxes a text speaks of.

    Args:
        object_tags: of each text token the number of its box, -1 for none.

    Returns:
        Boxes to be added, in ascending order; their token types 2, 3, ...; and the token type of each text token, 0
        or that of its box.
    """
    boxes = sorted({tag for tag in object_tags if tag >= 0})
    types = {tag: place + 2 for place, tag in enumerate(boxes)}
    return boxes, list(types.values()), [types.get(tag, 0) for tag in object_tags]
