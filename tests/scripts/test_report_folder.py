"""scripts/report/folder.py: a report is renewed, files of others are left alone."""

import pytest

from data.errors import DataError
from scripts import make_caption_report, make_report, make_vizwiz_report
from scripts.report.folder import CURVES, PAGE, SUMMARY, check_output, write_report


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_report_is_renewed_unasked(tmp_path):
    for title, curves in (("first", b"old"), ("second", b"new"), ("third", None), ("fourth", b"newest")):
        check_output(tmp_path, overwrite=False)
        write_report(tmp_path, title, curves, {"of": title})
        summary = f'{{\n "of": "{title}"\n}}\n'.encode()
        assert content(tmp_path) == {PAGE: title.encode(), SUMMARY: summary} | ({CURVES: curves} if curves else {})


def test_a_report_without_curves_leaves_those_of_somebody_else_alone(tmp_path):
    (tmp_path / CURVES).write_bytes(b"of somebody else")
    check_output(tmp_path, overwrite=False, has_curves=False)
    write_report(tmp_path, "page", None, {})
    assert content(tmp_path)[CURVES] == b"of somebody else"


@pytest.mark.parametrize("name", [PAGE, CURVES, SUMMARY])
def test_a_file_of_somebody_else_is_refused_unless_asked(tmp_path, name):
    (tmp_path / name).write_text("of somebody else")
    with pytest.raises(DataError, match=rf"{name} is there and was not written by this program.*--overwrite"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path, overwrite=True)
    write_report(tmp_path, "page", b"curves", {})
    check_output(tmp_path, overwrite=False)


@pytest.mark.parametrize("name", [PAGE, CURVES, SUMMARY])
def test_a_report_that_was_changed_since_is_refused(tmp_path, name):
    write_report(tmp_path, "page", b"curves", {})
    with (tmp_path / name).open("a") as file:
        file.write("a note")
    with pytest.raises(DataError, match=rf"{name} is there and .* was changed since"):
        check_output(tmp_path, overwrite=False)


def test_a_report_without_curves_does_not_mind_a_file_of_their_name(tmp_path):
    (tmp_path / CURVES).write_text("of somebody else")
    check_output(tmp_path, overwrite=False, has_curves=False)
    write_report(tmp_path, "page", None, {})
    assert (tmp_path / CURVES).read_text() == "of somebody else"


@pytest.mark.parametrize("program", [make_report, make_caption_report, make_vizwiz_report])
@pytest.mark.parametrize("asked", [False, True])
def test_every_report_asks_before_anything_is_read(tmp_path, monkeypatch, program, asked):
    """What comes after the look at the folder is stood for by a stop."""

    def read(*_, **__):
        raise InterruptedError

    places = {"--run": tmp_path, "--data_path": tmp_path, "--output": tmp_path}
    if program is make_vizwiz_report:
        places = {"--answers": tmp_path, "--image_folder": tmp_path, "--output": tmp_path}
    for reader in ("read_predictions", "read_captions", "read_answers"):
        if hasattr(program, reader):
            monkeypatch.setattr(program, reader, read)
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    (tmp_path / PAGE).write_text("of somebody else")
    argv = [str(word) for place in places.items() for word in place]
    with pytest.raises(InterruptedError if asked else DataError, match=None if asked else f"{PAGE} is there"):
        program.main([*argv, *(["--overwrite"] if asked else [])])
    assert (tmp_path / PAGE).read_text() == "of somebody else"
