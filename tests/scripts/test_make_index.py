import json
import shutil
import subprocess
import sys

import pytest

from data.errors import DataError
from scripts.make_index import main
from tests.data.vqav2_tree import SPM, edit_json, image_name, write_json, write_vqav2
from tests.paths import ROOT

PROGRAM = ROOT / "scripts" / "make_index.py"
SMALL = ["--min_answer_count", "2", "--num_rest_val_images", "4"]


@pytest.fixture
def data_path(tmp_path):
    write_vqav2(tmp_path / "vqa")
    shutil.copy(SPM, tmp_path / "vqa" / "beit3.spm")
    return tmp_path / "vqa"


def test_the_summary_counts_each_file_and_says_what_was_skipped(data_path, capsys):
    (data_path / "train2014" / image_name("train2014", 3)).unlink()
    main(["vqav2", "--data_path", str(data_path), "--sentencepiece_model", str(SPM), *SMALL])
    out = capsys.readouterr().out
    assert f"written  {data_path / 'vqa.train.jsonl'}: 38 lines" in out
    assert "skipped 2 train2014 questions left out: their image is not in" in out
    assert "found   train2014 questions:" in out
    assert "4 answers" in out


def test_a_second_run_says_rewritten_and_gives_the_same_bytes(data_path, capsys):
    main(["--data_path", str(data_path), *SMALL])
    first = (data_path / "vqa.rest_val.jsonl").read_bytes()
    capsys.readouterr()
    main(["--data_path", str(data_path), *SMALL])
    assert f"rewritten  {data_path / 'vqa.rest_val.jsonl'}" in capsys.readouterr().out
    assert (data_path / "vqa.rest_val.jsonl").read_bytes() == first


@pytest.mark.parametrize("place", ["data/vqav2", "dataset"])
def test_the_bare_command_finds_data_and_tokenizer_at_the_default_places(tmp_path, monkeypatch, place):
    write_vqav2(tmp_path / place, num_train=40)
    shutil.copy(SPM, tmp_path / "beit3.spm")
    monkeypatch.chdir(tmp_path)
    main([])
    assert (tmp_path / place / "vqa.train.jsonl").stat().st_size > 0


def test_the_tokenizer_is_found_in_the_data_folder(data_path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    main(["--data_path", "vqa", *SMALL])
    assert (data_path / "answer2label.txt").exists()


def test_the_seed_flag_moves_rest_val(data_path):
    contents = []
    for seed in ("1", "2"):
        main(["vqav2", "--data_path", str(data_path), "--seed", seed, *SMALL])
        contents.append((data_path / "vqa.rest_val.jsonl").read_bytes())
    assert contents[0] != contents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data folder .looked for data/vqav2/ and dataset/ and data/coco/.: give --data_path DIR"),
        (["--data_path", "absent"], "no data folder .looked for absent/."),
        (["--data_path", "empty"], "no known data set in empty .*v2_OpenEnded_mscoco_train2014_questions.json"),
        (["vqav2", "--data_path", "empty"], "no sentencepiece model .looked for beit3.spm, empty/beit3.spm.: give"),
        (
            ["--data_path", "vqa", "--sentencepiece_model", "absent.spm"],
            "no sentencepiece model .looked for absent.spm",
        ),
        (["--data_path", "vqa", "--min_answer_count", "0"], "--min_answer_count must be at least 1, got 0"),
        (["--data_path", "vqa", "--num_rest_val_images", "0"], "--num_rest_val_images must be at least 1"),
        (["--data_path", "vqa", "--min_answer_count", "999"], "occurs 999 times: lower --min_answer_count"),
        (["vqav2", "--data_path", "vqa", "--check"], "answer2label.txt: scripts/make_index.py writes"),
    ],
)
def test_bad_arguments_are_named_with_a_way_out(data_path, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        main(arguments)


def test_a_sound_index_passes_the_check(data_path, capsys):
    main(["--data_path", str(data_path), *SMALL])
    capsys.readouterr()
    main(["--data_path", str(data_path), "--check"])
    out = capsys.readouterr().out
    assert "vqa.train.jsonl: 40 questions, 20 images, 0 of them missing" in out
    assert "every line is sound and every image is there" in out


def test_the_check_counts_missing_images_and_names_the_first_five(data_path, capsys):
    main(["--data_path", str(data_path), *SMALL])
    for image_id in range(2, 9):
        (data_path / "train2014" / image_name("train2014", image_id)).unlink()
    with pytest.raises(DataError, match="7 images are missing") as error:
        main(["--data_path", str(data_path), "--check"])
    assert str(error.value).count("COCO_train2014_") == 5
    assert "vqa.train.jsonl: 40 questions, 20 images, 7 of them missing" in capsys.readouterr().out


def test_the_check_finds_token_ids_of_another_tokenizer(data_path):
    main(["--data_path", str(data_path), *SMALL])
    path = data_path / "vqa.val.jsonl"
    path.write_text(path.read_text().replace('"text_segment": [', '"text_segment": [64000, ', 1))
    with pytest.raises(DataError, match=r"vqa.val.jsonl:1: text_segment must be .* got 64000"):
        main(["--data_path", str(data_path), "--check"])


@pytest.fixture
def caption_path(tmp_path):
    """COCO captions and NoCaps in one folder, with their images and a tokenizer."""
    root = tmp_path / "captions"
    splits = [("train", "train2014"), ("restval", "val2014"), ("val", "val2014"), ("test", "val2014")]
    images = [
        {"filepath": folder, "filename": f"{number}.jpg", "split": split, "cocoid": number}
        | {"sentences": [{"raw": "a red circle"}, {"raw": "one circle"}]}
        for number, (split, folder) in enumerate(splits)
    ]
    write_json(root / "dataset_coco.json", {"images": images})
    write_json(root / "nocaps_val_4500_captions.json", {"images": [{"id": 0, "file_name": "a.jpg"}]})
    write_json(root / "nocaps_test_image_info.json", {"images": [{"id": 1, "file_name": "b.jpg"}]})
    for name in (*(f"{image['filepath']}/{image['filename']}" for image in images), "val/a.jpg", "test/b.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    shutil.copy(SPM, root / "beit3.spm")
    return root


def test_the_bare_command_builds_every_data_set_that_it_finds(caption_path, capsys):
    write_vqav2(caption_path)
    main(["--data_path", str(caption_path), *SMALL])
    out = capsys.readouterr().out
    for name, lines in [
        ("vqa.train", 40),
        ("coco_captioning.train", 4),
        ("coco_captioning.val", 1),
        ("nocaps.test", 1),
    ]:
        assert f"written  {caption_path / name}.jsonl: {lines} lines" in out
    assert "warning" not in out


def test_a_named_data_set_alone_is_built(caption_path):
    main(["nocaps", "--data_path", str(caption_path)])
    assert {path.name for path in caption_path.glob("*.jsonl")} == {"nocaps.val.jsonl", "nocaps.test.jsonl"}


def test_nocaps_needs_no_tokenizer_but_coco_captions_do(caption_path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (caption_path / "beit3.spm").unlink()
    main(["nocaps", "--data_path", "captions"])
    with pytest.raises(DataError, match="no sentencepiece model"):
        main(["coco_captioning", "--data_path", "captions"])


def test_a_missing_image_folder_is_printed_as_a_warning(caption_path, capsys):
    shutil.rmtree(caption_path / "test")
    main(["nocaps", "--data_path", str(caption_path)])
    assert f"warning no image folder test in {caption_path}" in capsys.readouterr().out


def test_sound_caption_indices_pass_the_check(caption_path, capsys):
    main(["--data_path", str(caption_path)])
    capsys.readouterr()
    main(["--data_path", str(caption_path), "--check"])
    out = capsys.readouterr().out
    assert "coco_captioning.train.jsonl: 4 lines, 2 images, 0 of them missing" in out
    assert "nocaps.val.jsonl: 1 lines, 1 images, 0 of them missing" in out
    assert out.count("every line is sound and every image is there") == 2


def test_the_check_counts_missing_images_of_captions(caption_path):
    main(["nocaps", "--data_path", str(caption_path)])
    (caption_path / "val" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"1 images are missing in .*, the first val/a.jpg"):
        main(["nocaps", "--data_path", str(caption_path), "--check"])


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("train", {"text_segment": [64000]}, "text_segment must be a list of ids .* got .64000."),
        ("train", {"text_segment": None}, "text_segment must be a list of ids"),
        ("train", {"image_id": "1"}, "image_id must be a whole number, got '1'"),
        ("val", {"text_segment": [5]}, "text_segment must be null outside training"),
        ("val", {"image_path": "../a.jpg"}, "contains '..'"),
    ],
)
def test_the_check_names_a_bad_caption_line(caption_path, name, row, message):
    main(["coco_captioning", "--data_path", str(caption_path)])
    path = caption_path / f"coco_captioning.{name}.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **row}), *others, ""]))
    with pytest.raises(DataError, match=f"coco_captioning.{name}.jsonl:1: .*{message}"):
        main(["coco_captioning", "--data_path", str(caption_path), "--check"])


def test_the_check_of_captions_without_an_index_names_the_way_out(caption_path):
    with pytest.raises(DataError, match="no index of nocaps in .*: run scripts/make_index.py nocaps"):
        main(["nocaps", "--data_path", str(caption_path), "--check"])


def test_as_a_program_bad_input_is_one_line_and_exit_code_2(data_path):
    edit_json(data_path / "vqa/v2_mscoco_val2014_annotations.json", lambda c: c["annotations"].pop())
    done = subprocess.run(
        [sys.executable, PROGRAM, "--data_path", data_path, *SMALL], capture_output=True, text=True, cwd=data_path
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "v2_mscoco_val2014_annotations.json: 1 question ids missing, the first [110001]" in done.stderr


def test_as_a_program_an_unknown_flag_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, PROGRAM, "--no_such"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--no_such" in done.stderr
