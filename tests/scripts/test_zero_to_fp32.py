"""scripts/zero_to_fp32.py: ZeRO checkpoints to one float32 file that gives the same predictions."""

import pytest
import torch

from engine.weights import read_state_dict
from scripts import zero_to_fp32
from scripts.program import run
from tests.helpers import run_program
from tests.scripts.bad_inputs import the_error_line
from tests.scripts.deepspeed_run import stage_3_run
from tests.scripts.vqa_run import drawn_data, eval_flags, program


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
def test_the_written_file_holds_the_weights_of_the_run_bit_by_bit(tmp_path, suffix):
    output, _ = stage_3_run()
    written = tmp_path / f"whole{suffix}"
    zero_to_fp32.main([str(output), str(written), "checkpoint-best"])
    weights, expected = read_state_dict(written), read_state_dict(output / "checkpoint-best")
    assert weights.keys() == expected.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in weights.items())
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_the_written_file_predicts_what_the_checkpoint_predicts(tmp_path):
    output, _ = stage_3_run()
    best = output / "checkpoint-best"
    zero_to_fp32.main([str(output), str(tmp_path / "whole.pth"), "checkpoint-best"])
    beside = ("--eval_split", "val", "--sentencepiece_model", str(best / "beit3.spm"))
    beside += ("--answer_list", str(best / "answer2label.txt"))
    program(*eval_flags(best, tmp_path / "a", *beside))
    program(*eval_flags(tmp_path / "whole.pth", tmp_path / "b", *beside))
    one, other = ((tmp_path / name / "top_answers_vqav2_val.jsonl").read_bytes() for name in "ab")
    assert one
    assert one == other


def test_without_a_tag_the_newest_checkpoint_is_taken_and_debug_lists_its_weights(tmp_path, capsys):
    output, _ = stage_3_run()
    zero_to_fp32.main([str(output), str(tmp_path / "whole.pth"), "-d"])
    said = capsys.readouterr().out
    assert "checkpoint-step2: ZeRO stage 3, 2 ranks" in said
    assert "beit3.vision_embed.cls_token (1, 1, " in said


def test_an_existing_file_stays_unless_it_may_be_replaced(tmp_path, capsys):
    output, _ = stage_3_run()
    written = tmp_path / "whole.pth"
    written.write_bytes(b"precious")
    assert _fails([str(output), str(written)], capsys).endswith("give another file, or --overwrite")
    assert written.read_bytes() == b"precious"
    zero_to_fp32.main([str(output), str(written), "--overwrite"])
    assert read_state_dict(written)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "{new}/whole.txt"], "must be a file ending in"),
        (["{run}", "{new}/absent/whole.pth"], "there is no folder"),
        (["{run}", "{new}/whole.pth", "nope"], "no folder 'nope'"),
        (["{data}", "{new}/whole.pth"], "no readable file 'latest'"),
        (["{data}", "{new}/whole.pth", "vqa"], "has no mp_rank_00_model_states.pt"),
        (["{new}/absent", "{new}/whole.pth"], "is no folder"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, words):
    places = {"run": stage_3_run()[0], "new": tmp_path, "data": drawn_data()}
    assert words in _fails([argument.format(**places) for argument in arguments], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    output, _ = stage_3_run()
    assert "free some space" in _fails([str(output), str(tmp_path / "whole.pth")], capsys, code=1)
    assert list(tmp_path.iterdir()) == []


def test_it_runs_as_a_program_without_deepspeed(tmp_path):
    output, _ = stage_3_run()
    code = "import sys, runpy; sys.modules['deepspeed'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    result = run_program("-c", code, "scripts/zero_to_fp32.py", str(output), str(tmp_path / "whole.pth"))
    assert result.returncode == 0, result.stderr
    assert "wrote 137 tensors" in result.stdout


def _fails(argv, capsys, *, code=2):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run(lambda: zero_to_fp32.main(argv))
    assert left.value.code == code
    return the_error_line(capsys.readouterr().err)
