import errno
import os

import pytest

from data.errors import DataError
from data.files import (
    iterate_jsonl,
    open_atomic,
    read_json,
    read_jsonl,
    resolve_inside,
    write_json_atomic,
    write_jsonl_atomic,
)


def written(tmp_path, content, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_jsonl_accepts_bom_crlf_blank_lines_and_no_final_line_end(tmp_path):
    path = written(tmp_path, '\ufeff{"a": 1}\r\n\r\n{"a": "é"}'.encode())
    assert read_jsonl(path) == [{"a": 1}, {"a": "é"}]


def test_jsonl_yields_the_true_line_numbers(tmp_path):
    path = written(tmp_path, b'{"a": 1}\n\n{"a": 2}\n')
    assert list(iterate_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_jsonl_does_not_break_lines_at_unicode_separators(tmp_path):
    path = written(tmp_path, '{"a": "x\u2028y\u0085z"}\n'.encode())
    assert read_jsonl(path) == [{"a": "x\u2028y\u0085z"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 2}\n', r"rows\.jsonl:2: not JSON"),
        (b'{"a": 1}\n{"a": NaN}\n', r"rows\.jsonl:2: not JSON \(NaN is not"),
        (b'{"a": -Infinity}\n', r"rows\.jsonl:1: not JSON \(-Infinity is not"),
        (b'{"a": 1}\n[1]\n', r"rows\.jsonl:2: a line must be a JSON object .* got a list"),
        (b'{"a": 1}\nnull\n', r"rows\.jsonl:2: .* got null"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"rows\.jsonl:2: not UTF-8"),
        ('{"a": 1}\n'.encode("utf-16"), r"rows\.jsonl:1: not UTF-8 text \(it looks like UTF-16\)"),
        (b'{"a": 1}\n{"a": [1, 2', r"rows\.jsonl:2: the last line is cut off"),
        (b'{"a": 1}\n' + b"\0" * 64, r"rows\.jsonl:2: the last line is cut off"),
        (b"[" * 200_000 + b"\n", r"rows\.jsonl:1: not JSON"),
        (b"", r"rows\.jsonl is empty: run the builder"),
        (b"\n \r\n", r"rows\.jsonl is empty: run the builder"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message) as error:
        read_jsonl(written(tmp_path, content), advice="run the builder")
    assert "\n" not in str(error.value)


def test_an_empty_jsonl_file_is_read_where_allowed(tmp_path):
    assert read_jsonl(written(tmp_path, b""), allow_empty=True) == []


def test_a_missing_file_names_the_way_out(tmp_path):
    for read in (read_json, read_jsonl):
        with pytest.raises(DataError, match="no such file: .*absent.json: run the builder"):
            read(tmp_path / "absent.json", advice="run the builder")


def test_a_folder_in_place_of_a_file_is_an_input_error(tmp_path):
    for read in (read_json, read_jsonl):
        with pytest.raises(DataError, match="cannot read"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"a": [1, 2', r"rows\.json:1: not JSON .* cut off"),
        (b'{"a": "tex', r"rows\.json:1: not JSON .* cut off"),
        (b'{\n"a" 1}', r"rows\.json:2: not JSON .* mend the file"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{\n"a": "\xff"}', r"rows\.json:2: not UTF-8"),
    ],
)
def test_a_bad_json_file_is_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_json(written(tmp_path, content, "rows.json"))


def test_json_accepts_a_byte_order_mark(tmp_path):
    assert read_json(written(tmp_path, b'\xef\xbb\xbf{"a": 1}', "rows.json")) == {"a": 1}


def test_written_files_read_back_equal(tmp_path):
    rows = [{"a": "é\n", "b": [0.3, 1]}, {"a": None}]
    assert write_jsonl_atomic(tmp_path / "new" / "rows.jsonl", iter(rows)) == 2
    assert read_jsonl(tmp_path / "new" / "rows.jsonl") == rows
    write_json_atomic(tmp_path / "rows.json", rows, indent=2)
    assert read_json(tmp_path / "rows.json") == rows


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = written(tmp_path, b'{"old": 1}\n')

    def rows():
        yield {"new": 1}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_jsonl_atomic(path, rows())
    assert path.read_bytes() == b'{"old": 1}\n'
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "a.json", {"score": float("nan")})
    assert os.listdir(tmp_path) == []


def test_the_name_appears_only_when_the_block_ends(tmp_path):
    with open_atomic(tmp_path / "a.txt") as handle:
        handle.write("text")
        assert not (tmp_path / "a.txt").exists()
    assert (tmp_path / "a.txt").read_text() == "text"


def test_a_full_disk_is_told_with_the_name_of_the_file_and_the_older_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json_atomic(path, 1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_json_atomic(path, 2)
    assert error.value.filename == str(path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["1\n"]


def test_a_folder_that_is_a_file_is_told_by_its_own_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as error:
        write_json_atomic(tmp_path / "file" / "a.json", 2)
    assert error.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("relative", ["a.jpg", "train2014/a.jpg", "./a.jpg", "a..b/c.jpg", "..a/b.jpg"])
def test_relative_paths_are_joined(tmp_path, relative):
    assert resolve_inside(tmp_path, relative) == tmp_path / relative


@pytest.mark.parametrize(
    "relative",
    ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "a/../b.jpg", "..", "C:/a.jpg", "C:\\a.jpg", "..\\a.jpg",
     "\\\\host\\a", "", "a\0.jpg", "a/" + "x" * 256, "é" * 200, "\ud800.jpg", None, 3],
)  # fmt: skip
def test_paths_that_lead_out_of_the_folder_or_cannot_be_are_refused(tmp_path, relative):
    with pytest.raises(DataError, match="path|longer than 255 bytes"):
        resolve_inside(tmp_path, relative)


def test_links_placed_by_the_user_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_text("image")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "train2014").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert resolve_inside(tmp_path / "root", "train2014/a.jpg").read_text() == "image"


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    target, link, pipe = tmp_path / "there" / "a.json", tmp_path / "b.json", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to(target)
    write_json_atomic(link, [1])
    write_json_atomic(link, [2])
    assert link.is_symlink()
    assert read_json(target) == [2]
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="pipe: it is a folder or a device, not a file"):
        write_json_atomic(pipe, [1])
    assert pipe.is_fifo()
