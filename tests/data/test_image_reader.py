import pytest

from data.errors import DataError
from data.image_reader import check_images_exist


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.png").touch()
    return tmp_path


def test_missing_images_are_counted_and_the_first_named(root):
    check_images_exist(["images/one.png", "images/one.png"], root)
    absent = [f"images/{number}.png" for number in range(9)]
    with pytest.raises(
        DataError, match=r"9 of 10 images are not in .*, the first: images/0.png, .*images/4.png; check"
    ):
        check_images_exist(["images/one.png", *absent, *absent], root)
    with pytest.raises(DataError, match="2 of 2 images are not in .*, the first: elsewhere/x.png, x.png; check"):
        check_images_exist(["elsewhere/x.png", "x.png"], root)


def test_images_behind_a_link_and_in_the_root_itself_are_there(root):
    (root / "linked").symlink_to(root / "images", target_is_directory=True)
    (root / "top.png").touch()
    check_images_exist(["linked/one.png", "top.png", "images/../images/one.png"], root)
