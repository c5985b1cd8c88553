import itertools
import json
import os

import numpy as np
import pytest
import torch

from data.clip_images import CLIPImageSettings
from data.errors import DataError
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
    average_precision,
    normalize_evalai,
    process_text,
    vizwiz_accuracy,
)
from data.metrics.vqa import ten_choose_nine
from data.vizwiz import (
    ANSWERS_KEY,
    SUFFIX,
    ConversionOptions,
    VizWizAnswer,
    VizWizRow,
    choose_answer,
    question_lines,
    read_questions,
    read_results,
    read_rows,
    training_file,
    upload_entries,
    write_submission,
)

# images


@pytest.mark.parametrize(("height", "width", "top", "left"), [(2, 5, 1, 0), (5, 2, 0, 1), (3, 4, 0, 0), (1, 6, 2, 0)])
def test_an_image_comes_into_the_middle_with_the_smaller_margin_first(height, width, top, left):
    image = np.random.default_rng(0).integers(0, 100, (height, width, 3), dtype=np.uint8)
    square = expand_to_square(image, (200, 201, 202))
    side = max(height, width)
    assert square.shape == (side, side, 3)
    assert np.array_equal(square[top : top + height, left : left + width], image)
    margin = np.ones((side, side), dtype=bool)
    margin[top : top + height, left : left + width] = False
    assert (square[margin] == [200, 201, 202]).all()


def test_the_margin_has_clips_mean_as_bytes_rounded_down():
    assert pad_color(CLIPImageSettings()) == (122, 116, 104)
    assert pad_color(CLIPImageSettings(mean=(0.5, 0.0, 1.0))) == (127, 0, 255)


def test_padding_keeps_both_ends_that_cropping_loses():
    image = np.zeros((8, 24, 3), dtype=np.uint8)
    image[:, :4], image[:, -4:] = 255, 255
    settings = CLIPImageSettings().resized(24)
    padded, cropped = LlavaTransform(settings, "pad")(image), LlavaTransform(settings)(image)
    assert padded.shape == cropped.shape == (3, 24, 24)
    assert padded[:, 8:16].eq(255).sum() == 3 * 8 * 8
    assert cropped.max() == 0
    assert padded.is_contiguous()


def test_tiles_are_refused_and_other_values_mean_no_padding():
    with pytest.raises(DataError, match="image_aspect_ratio 'anyres_max_9' .* set pad"):
        LlavaTransform(CLIPImageSettings(), "anyres_max_9")
    image = np.random.default_rng(0).integers(0, 255, (9, 20, 3), dtype=np.uint8)
    settings = CLIPImageSettings().resized(6)
    assert torch.equal(LlavaTransform(settings, "square")(image), LlavaTransform(settings)(image))


# order of samples


def some_lengths(num_images, num_texts, seed=0):
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, 60, num_images).tolist(), *(-rng.integers(1, 60, num_texts)).tolist()]
    return [lengths[i] for i in rng.permutation(len(lengths))]


def steps_of(lengths, batch_size, *, accumulation=1, world_size=1, epoch=0, first_step=0, seed=5):
    """For each optimizer step the batches that are read, over ranks and micro-batches."""
    steps = None
    for rank in range(world_size):
        sampler = LengthGroupedSampler(
            lengths, batch_size, accumulation_steps=accumulation, rank=rank, world_size=world_size, seed=seed
        )
        sampler.set_position(epoch, first_step)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        assert {key.epoch for batch in keys for key in batch} <= {epoch}
        batches = [[key.index for key in batch] for batch in keys]
        assert all(len(batch) == batch_size for batch in batches)
        mine = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
        steps = mine if steps is None else [one + other for one, other in zip(steps, mine, strict=True)]
    return steps


def flat(step):
    return [index for batch in step for index in batch]


SPLITS = [(b, a, w) for b, a, w in itertools.product((1, 2, 3, 4, 6, 12), repeat=3) if b * a * w == 12]


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), SPLITS)
def test_a_step_reads_the_same_samples_however_it_is_split(batch_size, accumulation, world_size):
    lengths = some_lengths(61, 40)
    whole = steps_of(lengths, 12, epoch=3)
    split = steps_of(lengths, batch_size, accumulation=accumulation, world_size=world_size, epoch=3)
    assert [sorted(flat(step)) for step in split] == [sorted(flat(step)) for step in whole]


@pytest.mark.parametrize(("num_images", "num_texts"), [(50, 0), (0, 50), (31, 20), (1, 40), (40, 1), (12, 12), (6, 6)])
def test_an_epoch_is_made_of_whole_steps_and_repeats_no_sample(num_images, num_texts):
    lengths = some_lengths(num_images, num_texts)
    steps = steps_of(lengths, 2, accumulation=3, world_size=2)
    read = [index for step in steps for index in flat(step)]
    assert len(steps) == len(lengths) // 12
    assert len(set(read)) == len(read) == 12 * len(steps)
    assert set(read) <= set(range(len(lengths)))


@pytest.mark.parametrize(("num_images", "num_texts"), [(50, 0), (31, 20), (1, 40), (3, 2), (8, 8)])
def test_an_order_holds_every_sample_once(num_images, num_texts):
    order = modality_grouped_order(some_lengths(num_images, num_texts), 2, 4, torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(num_images + num_texts))


def test_only_the_last_joined_blocks_mix_images_and_texts():
    lengths = some_lengths(70, 50)
    order = modality_grouped_order(lengths, 2, 4, torch.Generator().manual_seed(1))
    num_joined = (70 - 8 * (69 // 8)) + (50 - 8 * (49 // 8))
    for start in range(0, len(order) - num_joined, 8):
        assert len({lengths[index] > 0 for index in order[start : start + 8]}) == 1
    assert order[-num_joined:] == sorted(order[-num_joined:])


def test_batches_of_a_step_have_equal_numbers_and_similar_totals():
    lengths = some_lengths(64, 0)
    order = grouped_order(lengths, 4, 4, torch.Generator().manual_seed(0))
    for start in range(0, 64, 16):
        totals = [sum(lengths[index] for index in order[i : i + 4]) for i in range(start, start + 16, 4)]
        assert max(totals) - min(totals) < max(lengths)


def test_every_nth_sample_goes_to_a_chunk_if_the_number_does_not_divide():
    assert even_chunks([4, 3, 2, 1, 0], [9] * 5, 2) == [[4, 2, 0], [3, 1]]
    assert even_chunks([0, 1, 2, 3], [9, 1, 1, 1], 2) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("first_step", [0, 1, 4, 8])
def test_a_position_continues_where_an_unbroken_epoch_would_be(first_step):
    lengths = some_lengths(40, 27)
    resumed = steps_of(lengths, 2, accumulation=2, world_size=2, epoch=2, first_step=first_step)
    assert resumed == steps_of(lengths, 2, accumulation=2, world_size=2, epoch=2)[first_step:]


def test_epochs_differ_and_other_draws_change_nothing():
    lengths = some_lengths(40, 27)
    first = steps_of(lengths, 4, epoch=1)
    torch.manual_seed(99)
    assert steps_of(lengths, 4, epoch=1) == first != steps_of(lengths, 4, epoch=2)


def test_words_lie_between_white_space_and_texts_are_negative():
    texts = ["<image>\nwhat  is\tthis", "a cup"]
    assert modality_length(texts, has_image=True) == 6
    assert modality_length(texts, has_image=False) == -6


def test_a_sample_without_words_is_refused_by_number():
    with pytest.raises(DataError, match=r"sample 2 \(counted from 0\) has no words"):
        LengthGroupedSampler([3, -4, 0, 5], 1)
    with pytest.raises(DataError, match="sample 0"):
        modality_grouped_order([0, 1], 1, 1, torch.Generator())


def test_sizes_that_do_not_work_are_refused():
    with pytest.raises(DataError, match="must be at least 1, got 0 and 1"):
        LengthGroupedSampler([1, 2], 0)
    with pytest.raises(DataError, match="11 training samples do not fill one step of 12"):
        LengthGroupedSampler([1] * 11, 2, accumulation_steps=3, world_size=2)


# texts and scores


def test_the_fork_knows_two_more_contractions_and_they_too_hold_within_words():
    assert process_text("Its youre") == "its youre"
    assert process_text("Its youre", llava_fork=True) == "it's you're"
    assert process_text("hobbits", llava_fork=True) == "hobbit's"


@pytest.mark.parametrize(
    ("text", "normalized"), [("It's on", "it 's on"), ("none", "0"), ("red,white?", "redwhite"), ("A\nthe\t", "")]
)
def test_the_upload_rule_splits_possessives_and_deletes_commas(text, normalized):
    assert normalize_evalai(text) == normalized


@pytest.mark.parametrize(("count", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)])
def test_the_score_of_ten_people_depends_on_how_many_agree(count, score):
    assert ten_choose_nine("x", ["x"] * count + ["y"] * (10 - count)) == pytest.approx(score)


def test_accuracy_is_split_by_answer_type():
    answers = {"a": ["Yes."] * 10, "b": ["two"] * 2 + ["3"] * 8, "c": ["cup"] * 10}
    types = {"a": "yes/no", "b": "number"}
    found = vizwiz_accuracy({"a": "yes", "b": "2", "c": "mug"}, answers, types)
    assert found.per_image == pytest.approx({"a": 1.0, "b": 0.6, "c": 0.0})
    assert found.overall.value == pytest.approx(1.6 / 3)
    assert {name: mean.value for name, mean in found.per_answer_type.items()} == pytest.approx(
        {"yes/no": 1.0, "number": 0.6}
    )


def test_the_rules_differ_in_what_they_do_to_which_side():
    answers = {"a": ["it's a mug."] * 10}
    scores = {
        rule: vizwiz_accuracy({"a": "It's a mug"}, answers, rule=rule).overall.value
        for rule in ("course", "textvqa", "vizwiz")
    }
    assert scores == {"course": 1.0, "textvqa": 1.0, "vizwiz": 0.0}


@pytest.mark.parametrize(
    ("predictions", "answers", "rule", "message"),
    [
        ({}, {"a": ["x"] * 10}, "course", r"1 missing, 0 not asked \(first a\)"),
        ({"a": "x", "b": "x"}, {"a": ["x"] * 10}, "course", r"0 missing, 1 not asked \(first b\)"),
        ({}, {}, "course", "exactly the 0 images"),
        ({"a": "x"}, {"a": ["x"] * 3}, "course", "image a has 3 answers"),
        ({"a": "x"}, {"a": ["x"] * 10}, "own", "must be one of course, textvqa, vizwiz, got 'own'"),
    ],
)
def test_predictions_that_cannot_be_scored_are_refused(predictions, answers, rule, message):
    with pytest.raises(DataError, match=message):
        vizwiz_accuracy(predictions, answers, rule=rule)


def test_average_precision_of_worked_cases():
    def value(positive, scores):
        return average_precision(np.array(positive, dtype=bool), np.array(scores, dtype=float))

    assert value([1, 1, 0, 0], [4, 3, 2, 1]) == 1.0
    assert value([0, 1, 0, 1], [4, 3, 2, 1]) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert value([1, 0, 0, 0], [1, 1, 1, 1]) == pytest.approx(1 / 4)  # ties are one threshold, whatever their order
    assert value([0, 0, 0, 1], [1, 1, 1, 1]) == pytest.approx(1 / 4)
    assert value([1], [0]) == 1.0


def test_unanswerable_is_what_is_looked_for():
    assert answerability_scores([False, True], [0.1, 0.9]) == {"average_precision": 1.0, "f1": 1.0}
    assert answerability_scores([False, True], [0.5, 0.9]) == {"average_precision": 1.0, "f1": 0.0}  # strictly below


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([0, 1], [0.1], "1 answerability predictions for 2 questions"),
        ([0, 1], [0.1, float("nan")], r"prediction 1 must be in \[0, 1\], got nan"),
        ([0, 1], [1.5, 0.1], "prediction 0 must be in"),
        ([1, 1], [0.5, 0.1], "no question is unanswerable"),
    ],
)
def test_answerability_that_cannot_be_scored_is_refused(truth, predicted, message):
    with pytest.raises(DataError, match=message):
        answerability_scores(truth, predicted)


# files


def answers_of(*texts, confidence="yes"):
    return [{"answer": text, "answer_confidence": confidence} for text in texts]


def written(tmp_path, content):
    (tmp_path / "rows.json").write_text(json.dumps(content))
    return tmp_path / "rows.json"


def test_columns_are_read_in_the_order_of_their_numbers(tmp_path):
    numbers = ["10", "9", "0", "100"]
    content = {
        "image": {number: f"train_{number}.jpg" for number in numbers},
        "question": {number: f"What {number}" for number in numbers},
        "answers": {number: answers_of(*"ab") for number in numbers},
        "other": 5,
    }
    rows = read_rows(written(tmp_path, content))
    assert [row.id for row in rows] == ["train_0", "train_9", "train_10", "train_100"]
    assert rows[0] == VizWizRow(
        "train_0.jpg", "What 0", (VizWizAnswer("a", "yes"), VizWizAnswer("b", "yes")), None, None
    )


def test_original_lists_are_read_with_type_and_answerability(tmp_path):
    row = {"image": "VizWiz_val_0.jpg", "question": "Q?", "answers": answers_of("x"), "answer_type": "other"}
    rows = read_rows(written(tmp_path, [row | {"answerable": 0}, {"image": "VizWiz_test_1.jpg", "question": "?"}]))
    assert rows[0] == VizWizRow("VizWiz_val_0.jpg", "Q?", (VizWizAnswer("x", "yes"),), "other", False)
    assert rows[1] == VizWizRow("VizWiz_test_1.jpg", "?")


GOOD = {"image": "a.jpg", "question": "q"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no rows"),
        ("text", "must hold a list of rows or an object of columns"),
        ([GOOD, 3], "rows.json: row 1 must be an object"),
        ([GOOD | {"image": "../a.jpg"}], "rows.json: row 0: .* contains '..'"),
        ([{"question": "q"}], "rows.json: row 0: an image path"),
        ([{"image": "a.jpg"}], 'rows.json: row 0: "question" must be a text'),
        ([GOOD | {"answers": []}], 'rows.json: row 0: "answers" must be a list'),
        ([GOOD | {"answers": ["x"]}], "rows.json: row 0: an answer must be"),
        ([GOOD | {"answers": answers_of("x", confidence="surely")}], "rows.json: row 0: an answer must be"),
        ([GOOD | {"answer_type": 3}], 'rows.json: row 0: "answer_type" must be a text'),
        ([GOOD | {"answerable": 2}], 'rows.json: row 0: "answerable" must be 0 or 1'),
        ([GOOD, GOOD | {"image": "a.png"}], "rows.json: row 1 has the image name 'a' of row 0"),
        ({"image": {"0": "a.jpg"}}, 'rows.json has no column "question"'),
        ({"image": {"0": "a.jpg"}, "question": ["q"]}, 'column "question" must be an object'),
        ({"image": {"0": "a.jpg"}, "question": {"x": "q"}}, "the key 'x', keys must be row numbers"),
        ({"image": {"0": "a.jpg"}, "question": {"00": "q"}}, "the key '00'"),
        ({"image": {"0": "a.jpg"}, "question": {"0": "q", "11": "q"}}, "row 11 is not in both columns"),
        ({"image": {}, "question": {}}, "has no rows"),
        ({"image": {"7": "a.jpg"}, "question": {"7": 3}}, "row 7: "),
    ],
)
def test_a_file_of_another_form_is_refused_by_row(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(written(tmp_path, content))


def a_row(*answers, question="What IS this?"):
    return VizWizRow("a.b.jpg", question, tuple(VizWizAnswer(*answer) for answer in answers))


def test_the_most_frequent_answer_is_learnt_and_the_first_given_wins_ties():
    assert choose_answer(["blue", "Red.", "red", "the blue"]) == ("blue", False)
    assert choose_answer(["blue", "Red.", "red"]) == ("red", False)


def test_the_soft_choice_counts_four_people_like_more():
    answers = ["mug"] * 4 + ["cup"] * 6
    assert choose_answer(answers)[0] == "cup"
    assert choose_answer(answers, "soft")[0] == "mug"
    assert choose_answer(["mug"] * 3 + ["cup"] * 7, "soft")[0] == "cup"


def test_an_empty_answer_gives_way_to_the_next_one_and_is_counted():
    assert choose_answer(["a", "...", "the", "x", "y", "y"]) == ("y", True)
    assert choose_answer(["a", "the"]) == ("unanswerable", True)
    # signs alone are an answer all the same, and the score of VizWiz compares them
    assert choose_answer(["👍", "...", "👍"]) == ("👍", False)
    assert choose_answer(["$", "%", "yes!", "%"]) == ("%", False)
    converted = training_file([a_row(("a",), ("the",)), a_row(("x",)), a_row(("Unanswerable",))])
    assert (converted.num_replaced, converted.num_unanswerable, converted.num_distinct_answers) == (1, 2, 2)


def test_conversations_are_the_competitions_unless_asked_otherwise():
    row = a_row(("cell phone", "no"), ("Phone", "yes"), ("cell phone", "no"))
    (entry,) = training_file([row]).entries
    assert entry == {
        "id": "a.b",
        "image": "a.b.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is this"},
            {"from": "gpt", "value": "cell ph1"},
        ],
    }
    options = ConversionOptions(keep_questions_raw=True, suffix=SUFFIX, drop_unsure_answers=True)
    (entry,) = training_file([row], options).entries
    assert [turn["value"] for turn in entry["conversations"]] == [f"<image>\nWhat IS this?{SUFFIX}", "ph1"]
    assert question_lines([row], options)[0]["text"] == f"What IS this?{SUFFIX}"


def test_people_who_are_all_unsure_are_all_heard():
    (entry,) = training_file([a_row(("x", "no"))], ConversionOptions(drop_unsure_answers=True)).entries
    assert entry["conversations"][1]["value"] == "x"


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(DataError, match="image a.b.jpg has no answers to learn from"):
        training_file([a_row()])
    with pytest.raises(DataError, match="must be one of mode, soft, sample, all, got 'best'"):
        ConversionOptions(answer_choice="best")


def test_broken_result_lines_are_counted_and_the_last_answer_holds(tmp_path):
    lines = ['{"question_id": "a", "text": "x"}', '{"question_id": "b", "te', '{"question_id": "a", "text": "y"}']
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    assert read_results(tmp_path / "r.jsonl") == ({"a": "y"}, 1)


def test_ids_of_results_keep_their_kind(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"question_id": 1, "text": "x"}\n{"question_id": "1", "text": "y"}\n')
    assert read_results(tmp_path / "r.jsonl") == ({1: "x", "1": "y"}, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": "a"}', '"text" must be a text, got None'),
        ('{"question_id": true, "text": "x"}', '"question_id" must be a text or a whole number, got True'),
        ('{"text": "x"}', '"question_id" must be a text or a whole number, got None'),
        ("[]", "a line must be"),
    ],
)
def test_a_result_without_id_or_text_is_refused_by_line_and_key(tmp_path, line, message):
    (tmp_path / "r.jsonl").write_text('{"question_id": "a", "text": "x"}\n' + line)
    with pytest.raises(DataError, match=f"r.jsonl:2: {message}"):
        read_results(tmp_path / "r.jsonl")


def test_absent_results_are_refused(tmp_path):
    with pytest.raises(DataError, match="run the evaluation first"):
        read_results(tmp_path / "r.jsonl")


def test_questions_are_read_back_and_incomplete_ones_refused(tmp_path):
    questions = question_lines([a_row()])
    (tmp_path / "q.jsonl").write_text(json.dumps(questions[0]))
    assert read_questions(tmp_path / "q.jsonl") == questions
    (tmp_path / "q.jsonl").write_text('{"question_id": "a", "image": "a.jpg"}')
    with pytest.raises(DataError, match='q.jsonl:1: "text" must be a text, got None'):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text('{"question_id": 1.5, "image": "a.jpg", "text": "?"}')
    with pytest.raises(DataError, match='q.jsonl:1: "question_id" must be a text or a whole number, got 1.5'):
        read_questions(tmp_path / "q.jsonl")


def test_an_upload_has_the_order_of_the_questions_and_leaves_none_out():
    questions = [{"question_id": name, "image": f"{name}.jpg", "text": "q"} for name in "ba"]
    results = {"a": "It's", "b": "None", "c": "x"}
    assert upload_entries(questions, results) == [
        {"image": "b.jpg", "answer": "0"},
        {"image": "a.jpg", "answer": "it 's"},
    ]
    assert [entry["answer"] for entry in upload_entries(questions, results, process_text)] == ["n1", "it's"]
    with pytest.raises(DataError, match="1 of 2 questions have no answer, the first: b"):
        upload_entries(questions, {"a": "x"})


def test_a_submission_is_an_array_of_texts_that_needs_no_pickle(tmp_path):
    path = tmp_path / "new" / "submission.npy"
    write_submission(path, ["cup", "", "日本語 mug"])
    array = np.load(path, allow_pickle=False)
    assert array.dtype == "<U7"
    assert array.tolist() == ["cup", "", "日本語 mug"]
    assert [file.name for file in path.parent.iterdir()] == ["submission.npy"]


@pytest.mark.parametrize(
    ("answers", "message"), [([], "no answers to write"), (["a", None], "row 1 must be a text"), (["a\0"], "row 0")]
)
def test_a_submission_that_cannot_be_written_leaves_the_old_one(tmp_path, answers, message):
    path = tmp_path / "submission.npy"
    path.write_bytes(b"old")
    with pytest.raises(DataError, match=message):
        write_submission(path, answers)
    assert path.read_bytes() == b"old"


def test_a_write_that_fails_leaves_the_old_submission_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "submission.npy"
    path.write_bytes(b"old")
    monkeypatch.setattr("data.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_submission(path, ["x"])
    assert [file.name for file in tmp_path.iterdir()] == ["submission.npy"]
    assert path.read_bytes() == b"old"


def test_a_submission_goes_where_a_link_leads_and_never_over_a_device(tmp_path):
    target, link, pipe = tmp_path / "there" / "s.npy", tmp_path / "link.npy", tmp_path / "pipe"
    target.parent.mkdir()
    link.symlink_to(target)
    write_submission(link, ["x"])
    assert link.is_symlink()
    assert np.load(target, allow_pickle=False).tolist() == ["x"]
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="pipe: it is a folder or a device, not a file"):
        write_submission(pipe, ["x"])
    assert pipe.is_fifo()


def test_everybodys_answer_is_kept_for_the_epochs_to_draw_from_or_becomes_a_sample():
    row = a_row(*((text,) for text in ("A cup.", "a mug", "a mug", ".", "cup")))
    (entry,) = training_file([row], ConversionOptions(answer_choice="sample")).entries
    assert entry[ANSWERS_KEY] == ["cup", "mug", "mug", "cup"]
    assert entry["conversations"][-1]["value"] == "cup"
    entries = training_file([row], ConversionOptions(answer_choice="all")).entries
    assert [entry["conversations"][-1]["value"] for entry in entries] == ["cup", "mug", "mug", "cup"]
    assert len({entry["id"] for entry in entries}) == 4
    assert all(entry.keys() == {"id", "image", "conversations"} for entry in entries)
    (alone,) = training_file([a_row((".",), ("the",))], ConversionOptions(answer_choice="all")).entries
    assert alone["conversations"][-1]["value"] == "unanswerable"
