"""LLaVA's images, order of samples, files and scores against numbers recorded from the originals."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from data.clip_images import CLIPImageSettings, normalize
from data.errors import DataError
from data.files import write_jsonl_atomic
from data.images import decode_image
from data.llava_images import LlavaTransform, expand_to_square, pad_color
from data.llava_sampler import (
    LengthGroupedSampler,
    even_chunks,
    grouped_order,
    modality_grouped_order,
    modality_length,
)
from data.metrics.vizwiz import (
    answerability_scores,
    normalize_evalai,
    process_text,
    vizwiz_accuracy,
)
from data.metrics.vqa import ten_choose_nine
from data.vizwiz import question_lines, read_results, read_rows, training_file, upload_entries, write_submission
from engine.schedule import warmup_decay
from tests.parity.fixture_files import load_fixture


def clip_settings(config: dict, side: int) -> CLIPImageSettings:
    settings = CLIPImageSettings(mean=tuple(config["image_mean"]), std=tuple(config["image_std"]))
    return settings.resized(side)


def read_as_file(case: dict) -> np.ndarray:
    """The recorded image of any mode as the reader of image files delivers it."""
    image = Image.fromarray(case["image"].numpy())
    if case["mode"] == "P":
        image.putpalette(case["palette"].tolist())  # makes it one of mode P
    assert image.mode == case["mode"]
    file = io.BytesIO()
    image.save(file, format="png")
    return decode_image(file.getvalue(), "recorded")


def test_every_recorded_image_is_padded_and_transformed_bit_equal():
    recording = load_fixture("llava_image.pt")
    config = recording["config"]
    settings = clip_settings(config, config["size"])
    assert list(pad_color(settings)) == config["pad_color"]
    for case in recording["outputs"]["cases"]:
        image = read_as_file(case)
        if case.get("rgb") is not None:
            assert torch.equal(torch.from_numpy(image), case["rgb"])
        if case.get("padded") is not None:
            assert torch.equal(torch.from_numpy(expand_to_square(image, pad_color(settings))), case["padded"])
        for aspect_ratio, name in (("pad", "pad"), (None, "square"), ("square", "square")):
            pixels = LlavaTransform(settings, aspect_ratio)(image, None)
            assert pixels.dtype == torch.uint8
            assert torch.equal(normalize(pixels[None], settings)[0], case[name]), (case["mode"], case["size_wh"], name)


def test_the_published_size_is_bit_equal_at_the_recorded_pixels():
    recording = load_fixture("llava_image.pt")
    case = recording["outputs"]["at_336"]
    settings = clip_settings(recording["config"], 336)
    for aspect_ratio, name in (("pad", "pad"), (None, "square")):
        pixels = LlavaTransform(settings, aspect_ratio)(case["image"].numpy())
        values = normalize(pixels[None], settings)[0]
        assert torch.equal(values[:, ::16, ::16], case[name])
        assert values.mean().item() == pytest.approx(case[f"{name}_mean"], abs=1e-6)  # the order of sums is torch's
        assert values.std().item() == pytest.approx(case[f"{name}_std"], abs=1e-6)


def lengths_of(recording: dict, name: str) -> list[int]:
    if name in recording["inputs"]:
        return recording["inputs"][name]
    sign = {"only_images": 1, "only_text": -1}[name]
    return [sign * abs(length) for length in recording["inputs"]["mixed"]]


def test_every_recorded_order_is_the_same_and_refused_lengths_are_refused():
    recording = load_fixture("llava_sampler.pt")
    for case in recording["outputs"]["sampler"]:
        lengths = lengths_of(recording, case["name"])
        generator = torch.Generator().manual_seed(case["seed"])
        if case["raises"] is not None:
            with pytest.raises(DataError):
                modality_grouped_order(lengths, case["batch_size"], case["world_size"], generator)
            continue
        found = modality_grouped_order(lengths, case["batch_size"], case["world_size"], generator)
        assert found == case["indices"], case
        if case["name"] != "mixed":
            generator.manual_seed(case["seed"])
            assert grouped_order(lengths, case["batch_size"], case["world_size"], generator) == case["indices"]


def test_the_sampler_of_each_process_reads_the_recorded_order_up_to_whole_steps():
    recording = load_fixture("llava_sampler.pt")
    for case in recording["outputs"]["sampler"]:
        batch_size, num_batches = case["batch_size"], case["world_size"]
        step = batch_size * num_batches
        for world_size in range(1, num_batches + 1):
            if case["raises"] is not None or num_batches % world_size:
                continue
            shards = [
                list(
                    LengthGroupedSampler(
                        lengths_of(recording, case["name"]),
                        batch_size,
                        accumulation_steps=num_batches // world_size,
                        rank=rank,
                        world_size=world_size,
                        seed=case["seed"],
                    )
                )
                for rank in range(world_size)
            ]
            # batch k of the order goes to process k mod processes
            found = [key.index for batches in zip(*shards, strict=True) for batch in batches for key in batch]
            assert found == case["indices"][: len(case["indices"]) // step * step], case


def test_samples_are_dealt_out_as_recorded():
    for case in load_fixture("llava_sampler.pt")["outputs"]["split_to_even_chunks"]:
        assert even_chunks(case["indices"], case["lengths"], case["n"]) == case["chunks"]


def test_lengths_of_samples_are_as_recorded():
    outputs = load_fixture("llava_sampler.pt")["outputs"]
    samples = json.loads(outputs["conversations"])
    found = [
        modality_length((turn["value"] for turn in sample["conversations"]), has_image="image" in sample)
        for sample in samples
    ]
    assert found == outputs["modality_lengths"]


def test_the_learning_rates_of_the_original_are_those_of_the_engine():
    for case in load_fixture("llava_sampler.pt")["outputs"]["lr_schedule"]:
        assert math.ceil(case["total_steps"] * case["warmup_ratio"]) == case["warmup_steps"]
        rate = warmup_decay(
            case["base_lr"], 0.0, warmup_steps=case["warmup_steps"], total_steps=case["total_steps"], power=None
        )
        assert [rate(step) for step in range(len(case["lr_used_at_step"]))] == case["lr_used_at_step"]


def test_every_recorded_text_is_normalised_the_same_by_each_rule():
    outputs = load_fixture("llava_metric.pt")["outputs"]
    for name, rule in (
        ("process_text", process_text),
        ("process_text_llava_fork", lambda text: process_text(text, llava_fork=True)),
        ("evalai", normalize_evalai),
        ("evalai_words", normalize_evalai),
    ):
        assert {text: rule(text) for text in outputs[name]} == outputs[name], name


def test_the_texts_of_the_evaluation_recording_are_normalised_the_same():
    for row in load_fixture("evaluation_vqa.json")["normalisation"]:
        assert process_text(row["input"]) == row["course_baseline"]
        assert process_text(row["input"], llava_fork=True) == row["course_llava"]
        assert normalize_evalai(row["input"]) == row["llava_processor"]


def test_the_course_criterion_is_the_mean_of_ten_choose_nine_over_ids():
    for case in load_fixture("llava_metric.pt")["outputs"]["vqa_criterion"]:
        scores = [
            ten_choose_nine(prediction, answers)
            for prediction, answers in zip(case["pred"].tolist(), case["answers"].tolist(), strict=True)
        ]
        assert sum(scores) / len(scores) == pytest.approx(case["value"], abs=1e-12)


def test_textvqa_accuracy_compares_normalised_texts():
    for case in load_fixture("llava_metric.pt")["outputs"]["textvqa_accuracy"]:
        found = vizwiz_accuracy({"x": case["pred_answer"]}, {"x": case["gt_answers"]}, rule="textvqa")
        assert found.overall.value == pytest.approx(case["score"], abs=1e-12)


def test_the_rule_of_vizwiz_normalises_the_prediction_alone():
    recording = load_fixture("evaluation_vqa.json")
    questions = recording["accuracy"]["questions"]
    predictions = {str(q["question_id"]): q["prediction"] for q in questions}
    answers = {str(q["question_id"]): [answer["answer"] for answer in q["answers"]] for q in questions}
    found = vizwiz_accuracy(predictions, answers, rule="vizwiz")
    assert found.per_image == pytest.approx(recording["vizwiz"]["per_question"], abs=1e-12)


def test_answerability_is_scored_as_recorded_ties_taken_together():
    for case in load_fixture("evaluation_vqa.json")["vizwiz"]["answerability"]:
        found = answerability_scores(case["answerable_truth"], case["answerable_predicted"])
        assert found["average_precision"] == pytest.approx(case["average_precision"], abs=1e-12)
        assert found["f1"] == pytest.approx(case["f1_at_0.5"], abs=1e-12)


def test_the_files_of_the_competition_are_converted_to_the_recorded_text(tmp_path):
    recording = load_fixture("llava_metric.pt")
    for name in ("train", "valid"):
        (tmp_path / f"{name}.json").write_text(recording["inputs"][f"{name}_json"], encoding="utf-8")
    converted = training_file(read_rows(tmp_path / "train.json"))
    assert json.dumps(converted.entries, indent=4) == recording["outputs"]["train_for_llava"]
    write_jsonl_atomic(tmp_path / "valid.jsonl", question_lines(read_rows(tmp_path / "valid.json")))
    assert (tmp_path / "valid.jsonl").read_text(encoding="utf-8") == recording["outputs"]["valid_for_llava"]


def test_results_become_the_recorded_upload_and_submission(tmp_path):
    recording = load_fixture("llava_metric.pt")
    outputs = recording["outputs"]
    (tmp_path / "results.jsonl").write_text(recording["inputs"]["results_jsonl"], encoding="utf-8")
    results, num_broken = read_results(tmp_path / "results.jsonl")
    assert num_broken == 0
    entries = upload_entries([json.loads(line) for line in outputs["valid_for_llava"].splitlines()], results)
    assert json.dumps(entries) == outputs["upload_json"]
    answers = [entry["answer"] for entry in entries]
    assert answers == outputs["submission"]["values"]
    write_submission(tmp_path / "submission.npy", answers)
    assert (tmp_path / "submission.npy").read_bytes() == bytes(outputs["submission"]["file_bytes"].tolist())
    array = np.load(tmp_path / "submission.npy", allow_pickle=False)
    assert (array.dtype.str, list(array.shape)) == (outputs["submission"]["dtype"], outputs["submission"]["shape"])
