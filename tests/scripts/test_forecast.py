import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from scripts.forecast import PUBLISHED, main, predict
from scripts.forecast_models import SHAPES_ONLY, Step
from tests.paths import ROOT
from tests.scripts.bad_inputs import failure

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "beit3", pytest.param("captioning", marks=slow), "vle", "Standard", pytest.param("SpotTune", marks=slow),
        pytest.param("SpotTune_Block", marks=slow), pytest.param("BlockDrop", marks=slow), "llava",
    ],
)  # fmt: skip
def test_a_step_takes_the_memory_that_was_predicted_without_it(name, tmp_path):
    # measured: 2 % (beit3), 3 (captioning), 7 (vle), 6 (Standard), 7 (SpotTune), 7 (SpotTune_Block), 8 (BlockDrop),
    # 6 (llava); the rest is what the libraries take once, since the models here are small
    program = [sys.executable, ROOT / "tests" / "scripts" / "forecast_beside_process.py", name, tmp_path]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["measured"] > 200  # MiB: not lost in what a process takes anyway
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15)


TINY = ["beit3", "--model", "beit3_tiny_patch32_96", "--amp", "no"]


def row_of(capsys, *flags):
    main([*TINY, *flags])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return dict(zip(head, row, strict=True))


def test_the_largest_batch_of_a_card_fits_and_one_that_is_a_tenth_larger_does_not(capsys):
    row = row_of(capsys, "--cards", "2", "--batch_size", "8")
    largest = int(row["2 GB"])
    room = 0.95 * 2e9 - 0.75e9
    sizes = [
        float(row_of(capsys, "--batch_size", str(size))["peak"].split()[0]) for size in (largest, largest * 11 // 10)
    ]
    assert sizes[0] <= room / 1e9 + 0.05 < sizes[1]


def test_a_card_without_room_for_one_sample_is_said(capsys):
    assert row_of(capsys, "--cards", "1", "--batch_size", "8")["1 GB"] != "no"
    assert row_of(capsys, "--model", "beit3_base_patch16_480", "--cards", "1", "--batch_size", "1")["1 GB"] == "no"
    # weights of 2.1 GB and three times this for their gradients and moments
    found = predict(one_large_layer(), 4, amp="no", cards=[9, 12])
    assert found.held > 3 * 2.1e9
    assert found.largest[9] == 0 < found.largest[12]


def one_large_layer():
    with SHAPES_ONLY:
        model = torch.nn.Linear(1 << 14, 1 << 15)

    def batch(batch_size):
        with SHAPES_ONLY:
            inputs = torch.empty(batch_size, 1 << 14)
        return lambda: model(inputs).sum()

    return Step(model, batch)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["vle", "--model", "x"], r"--model x: no such vle model here; choose from vle-base, vle-large"),
        (["llava", "--model", "70b"], r"--model 70b: no such llava model here; choose from 7b, 13b"),
        (["beit3", "--model", "foo"], r"unknown model 'foo': choose one of"),
        (["vlbert", "--cfg", "none.yaml"], r"no config file none\.yaml"),
        (["vlbert", "--cfg", "cfgs/vqa/base_image_path.yaml"], r"looks at the images themselves"),
        (["vlbert", "--model", "base"], r"--model is not for vlbert: --cfg says the size"),
        (["beit3", "--boxes", "4"], r"--boxes is not for beit3: leave it out"),
        (["beit3", "--lora_dropout", "0"], r"--lora_dropout is not for beit3: leave it out"),
        (["beit3", "--recompute", "auto"], r"--recompute auto is of a run with its data: give none, full or every_K"),
        (["vle", "--recompute", "all"], r"must be none, full, auto, or every_K with K of 2 or more, got 'all'"),
        (["all", "--words", "4"], r"--words is not for all, which takes the published recipes: name a family"),
        (["llava", "--cards", "0"], r"must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_predicted_is_one_line_and_exit_code_2(flags, message, capsys):
    code, line = failure(capsys, flags, lambda *words: main(list(words)))
    assert code == 2
    assert re.search(message, line)


def table_of_the_docs():
    lines = (ROOT / "docs" / "memory.md").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("| run | batch |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    return {row.split("|")[1].strip(): row for row in rows}


@pytest.mark.parametrize(
    "label",
    [
        "VL-BERT base, Standard",
        *(pytest.param(label, marks=slow) for label in PUBLISHED if "base, Standard" not in label),
    ],
)
def test_the_table_of_the_docs_is_what_is_predicted(label, capsys):
    main([*PUBLISHED[label].split()])
    _, _, row = capsys.readouterr().out.splitlines()
    assert row.split("|")[2:] == table_of_the_docs()[label].split("|")[2:]


def rows_of_recomputed_layers():
    lines = (ROOT / "docs" / "memory.md").read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("| run | `--recompute` |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    return [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]


@slow
@pytest.mark.parametrize("cells", rows_of_recomputed_layers(), ids=lambda cells: "-".join(cells[:2]))
def test_the_table_of_recomputed_layers_is_what_is_predicted(cells, capsys):
    label, policy, *numbers = cells
    main([*PUBLISHED[label].split(), "--recompute", policy])
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    assert row[3:] == numbers


def test_the_tables_of_the_docs_agree_where_nothing_is_recomputed():
    of_recipes = {label: row.strip("|").split("|")[3:] for label, row in table_of_the_docs().items()}
    policies = {label: [] for label, *_ in rows_of_recomputed_layers()}
    for label, policy, *numbers in rows_of_recomputed_layers():
        policies[label].append(policy)
        if policy == "none":
            assert [cell.strip() for cell in of_recipes[label]] == numbers
    assert set(map(tuple, policies.values())) == {("none", "every_2", "full")}


def test_the_table_of_the_docs_has_every_published_recipe():
    assert list(table_of_the_docs()) == list(PUBLISHED)
