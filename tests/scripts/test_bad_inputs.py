"""Whatever a user can get wrong: exit code 2, one line that names it and the way out, and nothing overwritten."""

import io
import json
import pickle
import pickletools
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.weights import read_state_dict
from tests.helpers import run_program
from tests.scripts.bad_inputs import BadInputs, the_error_line
from tests.scripts.vqa_run import (
    LARGER,
    MODEL,
    PATCH,
    SIDE,
    STEM,
    drawn_data,
    eval_flags,
    failure,
    flags,
    program,
    train_flags,
    trained_checkpoint,
    tree,
)


class Case:
    """A private copy of the data, a trained checkpoint, and an output folder that holds an older result."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        tmp_path.mkdir(exist_ok=True)
        self.data = tmp_path / "data"
        shutil.copytree(drawn_data(), self.data)
        self.output = tmp_path / "output"
        self.output.mkdir()
        (self.output / "log.txt").write_text('{"epoch": 0}\n')
        (self.output / "submit_vqav2_val.json").write_text("[]\n")
        self.checkpoint = trained_checkpoint()

    def train(self, *more: str) -> list[str]:
        return train_flags(self.output, "--max_steps", "1", *more, data=self.data)

    def evaluate(self, *more: str, weights: Path | None = None) -> list[str]:
        return eval_flags(
            weights or self.checkpoint, self.output, "--eval_split", "val", *map(str, more), data=self.data
        )

    def edit_line(self, name: str, number: int, change: Callable[[dict], None]) -> None:
        """Change the object on one line of an index file."""
        path = self.data / name
        lines = path.read_text().splitlines()
        row = json.loads(lines[number - 1])
        change(row)
        lines[number - 1] = json.dumps(row)
        path.write_text("\n".join(lines) + "\n")

    def image_of(self, name: str, number: int = 1) -> Path:
        return self.data / json.loads((self.data / name).read_text().splitlines()[number - 1])["image_path"]

    def file(self, name: str, content: bytes | str) -> Path:
        path = self.tmp / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path


BAD = BadInputs()
bad = BAD.register
REST = "vqa.rest_val.jsonl"


# ---- flags ----


@bad(r"--data_path .*/absent is no folder")
def no_such_data_folder(case):
    return train_flags(case.output, data=case.tmp / "absent")


@bad(rf"unknown model 'beit3_huge_patch16_224'.*beit3_base_patch16_480.*{MODEL}")
def unknown_model(case):
    return case.train("--model", "beit3_huge_patch16_224", "--finetune", "")


@bad(rf"--input_size {SIDE + PATCH} is not the image size {SIDE}.*--model {LARGER}")
def input_size_that_is_not_the_models(case):
    return case.train("--input_size", SIDE + PATCH)


@bad(rf"image size {SIDE + 1} is not a multiple of the patch size {PATCH}: use {SIDE}")
def image_size_that_the_patch_does_not_divide(case):
    return case.train("--model", f"{STEM}_{SIDE + 1}")


@bad(r"argument --lr: must be at least 0, got -0.1 \(see --help\)")
def negative_lr(case):
    return case.train("--lr", "-0.1")


@bad(r"argument --batch_size: must be at least 1, got 0")
def batch_of_zero(case):
    return case.train("--batch_size", "0")


@bad(r"argument --update_freq: must be at least 1, got 0")
def update_freq_of_zero(case):
    return case.train("--update_freq", "0")


@bad(r"302 training samples do not fill one step of 4000 .*lower the batch size")
def batch_larger_than_the_data(case):
    return case.train("--batch_size", "4000")


@bad(r"unrecognized arguments: --no_such_flag \(see --help\)")
def unknown_flag(case):
    return case.train("--no_such_flag")


@bad(r"unrecognized arguments: --batchsize 4 \(did you mean --batch_size\? see --help\)")
def misspelt_flag(case):
    return case.train("--batchsize", "4")


@bad(r"argument --epochs: 'two' is no whole number \(see --help\)")
def number_of_epochs_in_words(case):
    return case.train("--epochs", "two")


@bad(r"--device must be auto, cuda, cuda:N or cpu, got 'gpu'")
def unknown_device(case):
    return case.train("--device", "gpu")


@bad(r"--eval needs weights: give --finetune")
def evaluation_without_weights(case):
    return flags("--eval", "--output_dir", str(case.output), data=case.data)


@bad(r"--task nlvr2 is not offered by this version; choose vqav2")
def task_not_offered(case):
    return case.train("--task", "nlvr2")


@bad(r"--finetune .*/absent.pth: no such file or folder")
def weights_that_are_not_there(case):
    return case.train("--finetune", case.tmp / "absent.pth")


@bad(r"float16 needs a CUDA device")
def half_precision_on_the_cpu(case):
    return case.train("--amp", "fp16")


@bad(r"--eval_split tset: choose train, val, val2014, test, test-dev, or a .jsonl file")
def unknown_split(case):
    return case.evaluate("--eval_split", "tset")


@bad(r"--opt_betas must be two numbers in \[0, 1\)")
def beta_of_one(case):
    return case.train("--opt_betas", "0.9", "1.0")


@bad(r"--output_dir .*/log.txt/run cannot be written \(Not a directory\): choose another folder")
def output_below_a_file(case):
    return train_flags(case.output / "log.txt" / "run", data=case.data)


@bad(r"--log_dir .*/log.txt/tb is not writable")
def log_dir_below_a_file(case):
    return case.train("--log_dir", case.output / "log.txt" / "tb")


@bad(r"--resume .*/absent: no checkpoint folder of a run there")
def resume_from_nowhere(case):
    return case.train("--resume", case.tmp / "absent")


@bad(r"--resume latest: .* holds no sound checkpoint")
def resume_of_the_latest_of_none(case):
    return case.train("--resume", "latest")


@bad(r"/torn: model.pth has \d+ bytes instead of \d+; give another checkpoint")
def resume_from_a_torn_checkpoint(case):
    shutil.copytree(case.checkpoint, case.tmp / "torn")
    whole = (case.tmp / "torn" / "model.pth").read_bytes()
    (case.tmp / "torn" / "model.pth").write_bytes(whole[: len(whole) // 2])
    return case.train("--resume", case.tmp / "torn")


@bad(r"cannot resume: .*/checkpoint-step2 is of .*, this run is of .*; give --model")
def resume_from_a_checkpoint_of_another_model(case):
    return case.train("--resume", case.checkpoint, "--model", LARGER)


# ---- index and images ----


def spoil_images(case: Case, count: int) -> None:
    """Empty the images of the first ``count`` questions of val."""
    for line in range(1, count + 1):
        case.image_of(REST, line).write_bytes(b"")


@bad(r"no such file: .*/vqa.train.jsonl: run scripts/make_index.py")
def no_index(case):
    (case.data / "vqa.train.jsonl").unlink()
    return case.train()


@bad(r"vqa.train.jsonl is empty: run scripts/make_index.py")
def empty_index(case):
    (case.data / "vqa.train.jsonl").write_text("")
    return case.train()


@bad(r"vqa.rest_val.jsonl:3: not JSON")
def malformed_line(case):
    lines = (case.data / REST).read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"qid":', '"qid" ')
    (case.data / REST).write_text("".join(lines))
    return case.evaluate()


@bad(r"vqa.rest_val.jsonl:2: text_segment must be at least 0 and below \d+, the size of the vocabulary, got 64000")
def token_ids_beyond_the_tokenizer(case):
    case.edit_line(REST, 2, lambda row: row.update(text_segment=[64000]))
    return case.evaluate()


@bad(r"the sentencepiece model has \d+ ids but the model 20 rows of text embedding")
def vocabulary_smaller_than_the_tokenizers(case):
    return case.train("--vocab_size", "20")


@bad(r"1 of \d+ images are not in .*, the first: val2014/COCO_val2014_\d+.jpg; .*--skip_broken_images")
def missing_image(case):
    case.image_of(REST).unlink()
    return case.evaluate()


@bad(r"sample 0 \(question \d+\): cannot read image .*COCO_val2014_\d+.jpg: .*truncated.*; replace the file or remove")
def truncated_image(case):
    image = case.image_of(REST)
    image.write_bytes(image.read_bytes()[:800])
    return case.evaluate()


@bad(r"cannot read image .*COCO_val2014_\d+.jpg: .*truncated")
def truncated_image_read_by_a_worker(case):
    truncated_image(case)
    return case.evaluate("--num_workers", "2")


@bad(r"cannot read image .*COCO_val2014_\d+.jpg: the file is empty")
def image_of_no_bytes(case):
    case.image_of(REST).write_bytes(b"")
    return case.evaluate()


@bad(r"cannot read image .*COCO_val2014_\d+.jpg: .*more than 64,000,000")
def decompression_bomb(case):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0))
    case.image_of(REST).write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return case.evaluate()


@bad(r"11 images could not be read; .* at most 10 here \(--max_bad_samples 0.001 .*; the last: sample \d+ .*is empty")
def too_many_images_to_replace(case):
    spoil_images(case, count=11)
    return case.evaluate("--skip_broken_images", "--num_workers", "2")


@bad(r"vqa.rest_val.jsonl:1: '../secret.jpg' contains '..'; .*inside the data folder")
def image_path_that_leaves_the_data_folder(case):
    case.edit_line(REST, 1, lambda row: row.update(image_path="../secret.jpg"))
    return case.evaluate()


@bad(r"vqa.rest_val.jsonl:1: '/etc/hostname' is absolute")
def absolute_image_path(case):
    case.edit_line(REST, 1, lambda row: row.update(image_path="/etc/hostname"))
    return case.evaluate("--skip_broken_images")


@bad(r"vqa.train.jsonl:1: question \d+ has no labels, training data need them")
def index_without_labels_for_training(case):
    case.edit_line("vqa.train.jsonl", 1, lambda row: row.update(labels=[], scores=[]))
    return case.train()


@bad(r"vqa.rest_val.jsonl:2: question id \d+ stands twice")
def question_id_twice(case):
    first = json.loads((case.data / REST).read_text().splitlines()[0])
    case.edit_line(REST, 2, lambda row: row.update(qid=first["qid"]))
    return case.evaluate()


# ---- answers, text, annotations, own data ----


@bad(r"answer2label.txt:2: label 0 where 1 is due")
def label_twice(case):
    case.edit_line("answer2label.txt", 2, lambda row: row.update(label=0))
    return case.train()


@bad(r"answer2label.txt:2: the answer '.*' has label 0 already")
def answer_twice(case):
    first = json.loads((case.data / "answer2label.txt").read_text().splitlines()[0])
    case.edit_line("answer2label.txt", 2, lambda row: row.update(answer=first["answer"]))
    return case.train()


@bad(r"answer2label.txt:1: label 1 where 0 is due; labels run 0, 1, 2")
def labels_out_of_order(case):
    path = case.data / "answer2label.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    return case.train()


@bad(r"no answer2label.txt in .*: run python scripts/make_index.py .*or give --answer_list")
def no_answer_list(case):
    (case.data / "answer2label.txt").unlink()
    return case.train()


@bad(r"beit3.spm is not a whole sentencepiece model")
def broken_sentencepiece_model(case):
    (case.data / "beit3.spm").write_bytes(b"\x00garbage" * 40)
    return case.train()


@bad(r"v2_mscoco_train2014_annotations.json annotates 0 of the \d+ questions .*give the annotations of this split")
def annotations_of_another_split(case):
    return case.evaluate("--annotations", case.data / "vqa" / "v2_mscoco_train2014_annotations.json")


@bad(r"questions.json has no list of annotations: give the raw v2_mscoco_<split>_annotations.json")
def questions_given_as_annotations(case):
    return case.evaluate("--annotations", case.data / "vqa" / "v2_OpenEnded_mscoco_val2014_questions.json")


@bad(r"no question in .*own.jsonl has answers: training needs lines such as")
def own_training_data_without_answers(case):
    row = {"image": str(case.image_of(REST).relative_to(case.data)), "question": "what is it?"}
    return case.train("--train_file", case.file("own.jsonl", json.dumps(row) + "\n"))


@bad(r"--shuffle_images needs two different images, the split has 1")
def shuffled_images_of_one_image(case):
    return case.evaluate("--shuffle_images", "--limit_samples", "1")


# ---- checkpoints ----


@bad(r"damaged/config.json is not JSON: restore the file, or give the weights file in another folder")
def checkpoint_with_a_torn_note_of_its_model(case):
    shutil.copytree(case.checkpoint, case.tmp / "damaged")
    (case.tmp / "damaged" / "config.json").write_text('{"family": "be')
    return case.evaluate(weights=case.tmp / "damaged")


@bad(
    r"damaged/config.json: model must be a text, it is 3: restore the file, or give the weights file in another folder"
)
def checkpoint_with_a_changed_note_of_its_model(case):
    shutil.copytree(case.checkpoint, case.tmp / "damaged")
    note = json.loads((case.checkpoint / "config.json").read_text())
    (case.tmp / "damaged" / "config.json").write_text(json.dumps(note | {"model": 3}))
    return case.evaluate(weights=case.tmp / "damaged")


class Evil:
    """Writes a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@bad(r"evil.pth is refused: it holds pickled Python objects.*could execute code")
def code_in_a_zip_checkpoint(case):
    torch.save({"model": Evil(case.tmp / "data" / "marker")}, case.tmp / "evil.pth")
    return case.train("--finetune", case.tmp / "evil.pth")


@bad(r"evil.pth is refused: it holds pickled Python objects.*could execute code")
def code_in_a_legacy_checkpoint(case):
    torch.save(
        {"model": Evil(case.tmp / "data" / "marker")}, case.tmp / "evil.pth", _use_new_zipfile_serialization=False
    )
    return case.train("--finetune", case.tmp / "evil.pth")


@bad(r"evil.pth (is refused|cannot be read as a checkpoint: it is damaged, or a pickle of other things)")
def code_in_a_bare_pickle(case):
    case.file("evil.pth", pickle.dumps({"model": Evil(case.tmp / "data" / "marker")}))
    return case.train("--finetune", case.tmp / "evil.pth")


@bad(r"llava.bin: not a BEiT-3 checkpoint: no name in it begins with 'beit3.', it looks like LLaVA")
def checkpoint_of_another_family(case):
    torch.save({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, case.tmp / "llava.bin")
    return case.train("--finetune", case.tmp / "llava.bin")


@bad(r"other.pth was trained on 25 answers, the answer list has 26: give the --answer_list of these weights")
def head_of_another_size_in_an_evaluation(case):
    state = read_state_dict(case.checkpoint)
    state["head.3.weight"], state["head.3.bias"] = state["head.3.weight"][:-1], state["head.3.bias"][:-1]
    torch.save({"model": state}, case.tmp / "other.pth")
    return case.evaluate(weights=case.tmp / "other.pth")


@bad(r"pointer.pth.* it is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
def git_lfs_pointer(case):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
    return case.train("--finetune", case.file("pointer.pth", pointer))


@bad(r"pointer.safetensors.* it is a Git LFS pointer")
def git_lfs_pointer_in_place_of_safetensors(case):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
    return case.train("--finetune", case.file("pointer.safetensors", pointer))


@bad(r"page.pth.* it is a web page.*download it again")
def web_page_as_checkpoint(case):
    return case.train("--finetune", case.file("page.pth", "<!DOCTYPE html><html><body>404</body></html>"))


@bad(r"cut.pth cannot be read as a checkpoint: it is cut off at \d+ bytes; download or copy it again")
def truncated_zip_checkpoint(case):
    whole = (case.checkpoint / "model.pth").read_bytes()
    return case.train("--finetune", case.file("cut.pth", whole[: len(whole) // 2]))


@bad(r"empty.pth is empty \(0 bytes\)")
def empty_checkpoint(case):
    return case.train("--finetune", case.file("empty.pth", b""))


@bad(r"notes.pth cannot be read as a checkpoint: it is a zip archive of other files; unpack it")
def zip_file_that_is_no_checkpoint(case):
    with zipfile.ZipFile(case.tmp / "notes.pth", "w") as archive:
        archive.writestr("notes.txt", "hello")
    return case.train("--finetune", case.tmp / "notes.pth")


@bad(r"nan.pth: the checkpoint's weight 'beit3.text_embed.weight' holds NaN or infinite values")
def nan_weights(case):
    state = read_state_dict(case.checkpoint)
    state["beit3.text_embed.weight"][3, 3] = float("nan")
    torch.save({"model": state}, case.tmp / "nan.pth")
    return case.evaluate(weights=case.tmp / "nan.pth")


@bad(r"narrow.pth: the checkpoint does not fit the model \(1 missing .*; 1 unexpected .*; \d+ of another shape: .*\)")
def checkpoint_of_another_size(case):
    state = read_state_dict(case.checkpoint)
    state = {name: value[..., : value.shape[-1] // 2] for name, value in state.items() if name.startswith("beit3.")}
    state["beit3.encoder.layers.99.ffn.A.fc1.bias"] = torch.zeros(2)
    del state["beit3.vision_embed.cls_token"]
    torch.save({"model": state}, case.tmp / "narrow.pth")
    return case.train("--finetune", case.tmp / "narrow.pth")


@bad(r"old.pth cannot be read as a checkpoint: it is a tar file; .* save .* again with a newer one")
def tar_of_an_old_torch(case):
    with tarfile.open(case.tmp / "old.pth", "w") as archive:
        archive.add(case.file("pickle", pickle.dumps({})), "pickle")
    return case.train("--finetune", case.tmp / "old.pth")


@bad(r"module.pth is refused: it holds pickled Python objects .*\(torch.nn.modules.linear.Linear\); .* state dict")
def whole_module_as_checkpoint(case):
    torch.save(torch.nn.Linear(2, 2), case.tmp / "module.pth")
    return case.train("--finetune", case.tmp / "module.pth")


@bad(r"again.pth is refused: its entries are compressed, .*zip bomb\); give the file as it was saved")
def checkpoint_that_was_zipped_again(case):
    with (
        zipfile.ZipFile(case.checkpoint / "model.pth") as whole,
        zipfile.ZipFile(case.tmp / "again.pth", "w", zipfile.ZIP_DEFLATED) as again,
    ):
        for name in whole.namelist():
            again.writestr(name, whole.read(name))
    return case.train("--finetune", case.tmp / "again.pth")


@bad(r"lying.safetensors is not a sound safetensors file \(.*(incomplete metadata|offset).*\): it is damaged")
def safetensors_with_offsets_beyond_its_end(case):
    header = json.dumps({"x": {"dtype": "F32", "shape": [600], "data_offsets": [0, 2400]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(24)
    return case.train("--finetune", case.file("lying.safetensors", content))


@bad(r"header.safetensors is not a sound safetensors file \(.*header.*\): it is damaged")
def safetensors_with_a_huge_header(case):
    return case.train("--finetune", case.file("header.safetensors", struct.pack("<Q", 1 << 60) + b"{}" + bytes(24)))


@bad(r"packed.pth: the checkpoint's weight 'beit3.text_embed.weight' holds int8 where the model has float32: give")
def quantised_weights(case):
    state = read_state_dict(case.checkpoint)
    state["beit3.text_embed.weight"] = state["beit3.text_embed.weight"].to(torch.int8)
    torch.save({"model": state}, case.tmp / "packed.pth")
    return case.evaluate(weights=case.tmp / "packed.pth")


@bad(r"data holds no weights: looked for model.pth, model.safetensors")
def folder_without_weights(case):
    return case.train("--finetune", case.data)


@bad(r"model.safetensors.index.json needs the shard b.safetensors, which is not in")
def sharded_index_without_its_shard(case):
    index = json.dumps({"weight_map": {"x": "b.safetensors"}})
    return case.train("--finetune", case.file("model.safetensors.index.json", index))


@bad(r"trained.* was trained on another answer list \(26 answers there, 26 here\): leave --answer_list out")
def another_answer_list_of_the_same_length_in_an_evaluation(case):
    lines = (case.data / "answer2label.txt").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines][::-1]
    rows = [json.dumps({"answer": answer, "label": label}) + "\n" for label, answer in enumerate(answers)]
    return case.evaluate("--answer_list", case.file("reversed.txt", "".join(rows)))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2_and_overwrites_nothing(name, tmp_path, capsys):
    spoil, message = BAD[name]
    argv = spoil(Case(tmp_path))
    before = tree(tmp_path)
    code, line = failure(capsys, argv)
    assert code == 2, line
    assert re.search(message, line), line
    assert without_partial_results(tree(tmp_path)) == before


def without_partial_results(files: dict[str, str]) -> dict[str, str]:
    """What an evaluation had answered before it stopped is kept beside the other files, for the next call."""
    return {name: checksum for name, checksum in files.items() if "/.partial-" not in name}


@pytest.mark.parametrize("name", ["code_in_a_zip_checkpoint", "code_in_a_legacy_checkpoint"])
def test_the_evil_checkpoints_really_hold_a_call(tmp_path, name):
    case = Case(tmp_path)
    argv = BAD[name][0](case)
    path = Path(argv[argv.index("--finetune") + 1])
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            (member,) = (member for member in archive.namelist() if member.endswith("data.pkl"))
            stream, before = io.BytesIO(archive.read(member)), 0
    else:
        stream, before = io.BytesIO(path.read_bytes()), 3  # magic number, version and system
    for _ in range(before):
        list(pickletools.genops(stream))
    content = [(code.name, argument) for code, argument, _ in pickletools.genops(stream)]  # read, not run
    arguments = [str(argument) for _, argument in content]
    assert "REDUCE" in [code for code, _ in content]  # calls what stands before it
    assert "touch" in arguments
    assert "marker" in arguments


def test_a_broken_image_in_training_ends_it_with_one_line_and_keeps_the_older_log(tmp_path, capsys):
    case = Case(tmp_path)
    for name in ("vqa.train.jsonl", "vqa.trainable_val.jsonl"):
        for line in range(1, len((case.data / name).read_text().splitlines()) + 1):
            case.image_of(name, line).write_bytes(b"")
    code, line = failure(capsys, case.train("--num_workers", "2"))
    assert code == 2
    assert re.search(r"cannot read image .*COCO_\w+_\d+.jpg: the file is empty", line)
    assert (case.output / "log.txt.old").read_text() == '{"epoch": 0}\n'


def test_more_broken_images_are_replaced_if_the_share_is_raised(tmp_path, capsys):
    case = Case(tmp_path)
    spoil_images(case, count=11)
    program(*case.evaluate("--skip_broken_images", "--max_bad_samples", "0.5"))
    assert re.search(r"warning: \d\d images could not be read and were replaced", capsys.readouterr().err)


def test_broken_images_are_replaced_and_counted_on_request(tmp_path, capsys):
    case = Case(tmp_path)
    case.image_of(REST).write_bytes(b"")
    questions = [line for line in (case.data / REST).read_text().splitlines() if case.image_of(REST).name in line]
    program(*case.evaluate("--skip_broken_images"))
    assert (
        f"warning: {len(questions)} images could not be read and were replaced by a grey one" in capsys.readouterr().err
    )


# ---- as real processes ----


@pytest.mark.parametrize(
    ("name", "environment", "message"),
    [
        ("unknown_flag", {}, BAD["unknown_flag"][1]),
        ("no_index", {}, BAD["no_index"][1]),
        ("code_in_a_bare_pickle", {}, BAD["code_in_a_bare_pickle"][1]),
        ("truncated_image_read_by_a_worker", {}, BAD["truncated_image_read_by_a_worker"][1]),
        (
            None,
            {"WORLD_SIZE": "2"},
            "torchrun start is incomplete: RANK is not set; start with torchrun, or unset RANK",
        ),
    ],
    ids=["flag", "index", "checkpoint", "worker", "launcher"],
)
def test_as_a_process_it_is_one_line_and_exit_code_2(name, environment, message, tmp_path):
    case = Case(tmp_path)
    argv = BAD[name][0](case) if name else case.train()
    before = tree(tmp_path)
    done = run_program("run_beit3_finetuning.py", *argv, **environment)
    line = the_error_line(done.stderr)
    assert done.returncode == 2, done.stderr
    assert line.startswith("run_beit3_finetuning.py: error: ")
    assert re.search(message, line), line
    assert without_partial_results(tree(tmp_path)) == before
