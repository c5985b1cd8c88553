"""LLaVA's tokenizer and labels: what is learned, what is refused."""

import json
import shutil

import pytest
import torch

from data.errors import DataError
from data.llava_conversation import (
    IGNORE_INDEX,
    TEMPLATES,
    Encoded,
    build_prompt,
    collate,
    encode_conversation,
    move_image_token,
)
from data.tokenizers.llama import IMAGE_TOKEN_ID, LlamaTokenizer, num_bytes
from tests.helpers import sent_to_a_process
from tests.original_labels import encode_as_the_original
from tests.parity.fixture_files import DEFAULT_FOLDER

MODEL = DEFAULT_FOLDER / "llava_tiny" / "llava" / "tokenizer.model"
LEARNING = [name for name, template in TEMPLATES.items() if not template.caption_only]


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "non_legacy"])
def tokenizer(request):
    return LlamaTokenizer.load(MODEL, legacy=request.param)


@pytest.fixture
def folder(tmp_path):
    shutil.copy(MODEL, tmp_path)
    return tmp_path


def encode(turns, tokenizer, template="v1", **settings):
    settings = {"has_image": True, "max_length": 2048, **settings}
    return encode_conversation(turns, tokenizer, TEMPLATES[template], **settings)


def as_the_original(turns, tokenizer, template="v1"):
    return encode_as_the_original(turns, tokenizer, TEMPLATES[template], has_image=True, max_length=2048)


def spans(encoded):
    """Neighbouring learned tokens, as lists."""
    found, before = [], False
    for label in encoded.labels:
        if label != IGNORE_INDEX:
            found.append([*found.pop(), label] if before else [label])
        before = label != IGNORE_INDEX
    return found


def test_special_ids_and_sizes(tokenizer):
    assert (tokenizer.unk_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 0, 1, 2)
    assert tokenizer.encode("<unk><s></s>") == [1, 0, 1, 2]
    assert max(tokenizer.encode("Größe 你好 😀")) < tokenizer.vocab_size


def test_a_tokenizer_in_another_process_is_the_same(tokenizer):
    again = sent_to_a_process(tokenizer)
    text = " a</s>USER: <image>\nb"
    assert again.encode_with_images(text) == tokenizer.encode_with_images(text)
    assert again.fingerprint == tokenizer.fingerprint


def test_the_fingerprint_tells_the_two_rules_for_word_starts_apart():
    fingerprints = {LlamaTokenizer.load(MODEL, legacy=legacy).fingerprint for legacy in (True, False)}
    assert len(fingerprints) == 2
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


@pytest.mark.parametrize("text", [" two  spaces ", "\nline", "Größe 你好 😀", "", "\u2581x", "tab\t"])
def test_plain_text_survives_the_round_trip_without_legacy(text):
    tokenizer = LlamaTokenizer.load(MODEL, legacy=False)
    assert tokenizer.decode(torch.tensor(tokenizer.encode(text))) == text.replace("\u2581", " ")


def test_decoding_leaves_out_images_and_rows_without_a_piece(tokenizer):
    ids = tokenizer.encode("is it")
    assert tokenizer.decode([*ids, IMAGE_TOKEN_ID, tokenizer.vocab_size + 5, tokenizer.eos_id]) == "is it"


@pytest.mark.parametrize("text", ["", "a", " a  b</s>c", "x <image>\n你😀</s> y<image>", "<image>", "<unk>  <s>▁ z "])
def test_places_grow_and_each_token_begins_where_it_says(tokenizer, text):
    ids, places = tokenizer.locate(text, images=True)
    assert ids == tokenizer.encode_with_images(text)
    assert places[0] == -1
    assert places == sorted(places)
    assert all(place <= num_bytes(text) for place in places)
    spelled = text.replace(" ", "\u2581").encode()
    for token, place in zip(ids, places, strict=True):
        if token == IMAGE_TOKEN_ID:
            assert spelled[place:].startswith(b"<image>")
        if token == tokenizer.eos_id:
            assert spelled[place:].startswith(b"</s>")


def test_half_a_surrogate_pair_is_an_error_that_names_the_sample(tokenizer):
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a \ud83d b")
    with pytest.raises(DataError, match=r"^a\.json 3: .*surrogate"):
        encode([("human", "a"), ("gpt", "\ud83d")], tokenizer, where="a.json 3")


@pytest.mark.parametrize(
    ("settings", "legacy"), [(None, True), ({}, True), ({"legacy": None}, True), ({"legacy": False}, False)]
)
def test_the_rule_for_word_starts_is_read_from_the_config(folder, settings, legacy):
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert LlamaTokenizer.load(folder).legacy is legacy
    assert LlamaTokenizer.load(folder, legacy=not legacy).legacy is not legacy


def test_added_tokens_are_cut_out_and_counted(folder):
    plain = LlamaTokenizer.load(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": plain.vocab_size}))
    tokenizer = LlamaTokenizer.load(folder)
    assert tokenizer.vocab_size == plain.vocab_size + 1
    assert tokenizer.encode("<pad>") == [1, plain.vocab_size]
    assert tokenizer.decode([plain.vocab_size, *plain.encode("is")]) == "is"


def test_files_that_cannot_be_used_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="no sentencepiece model at .*tokenizer.model"):
        LlamaTokenizer.load(tmp_path / "absent" / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text('{"legacy": "no"}')
    with pytest.raises(DataError, match="legacy must be true or false"):
        LlamaTokenizer.load(folder)
    (folder / "added_tokens.json").write_text("[1]")
    with pytest.raises(DataError, match="must map texts to ids"):
        LlamaTokenizer.load(folder, legacy=False)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(DataError, match="tokenizer_config.json: must be an object"):
        LlamaTokenizer.load(folder)
    (folder / "tokenizer.model").write_bytes(MODEL.read_bytes()[:101])
    with pytest.raises(DataError, match="tokenizer.model is not a whole sentencepiece model"):
        LlamaTokenizer.load(folder, legacy=False)


def test_another_layout_is_refused():
    with pytest.raises(DataError, match="Llama's layout needs"):
        LlamaTokenizer.load(DEFAULT_FOLDER / "vle_tiny_for_vqa" / "spm.model")


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("has_image", [True, False])
def test_every_answer_is_learned_with_its_end_and_nothing_else(tokenizer, name, has_image):
    answers = ["It is a can.", " 你好 😀", "a  b\n", "104", "say ASSISTANT: [/INST] no"]
    turns = [turn for answer in answers for turn in (("human", "What is this? "), ("gpt", answer))]
    if has_image:
        turns[0] = ("human", "What is <image> this?")
    encoded = encode(turns, tokenizer, name, has_image=has_image)
    assert len(encoded.ids) == len(encoded.labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    form = TEMPLATES[name].answer
    expected = [tokenizer.encode((form.before + answer + form.after)[1:], bos=False) for answer in answers]
    assert spans(encoded) == expected


@pytest.mark.parametrize("name", LEARNING)
def test_labels_of_a_conversation_do_not_depend_on_what_follows(tokenizer, name):
    turns = [("human", "hello"), ("gpt", "hi"), ("human", "look <image>"), ("gpt", "grey")]
    short, whole = (encode(part, tokenizer, name) for part in (turns[:2], turns))
    assert whole.ids[: len(short.ids)] == short.ids
    assert whole.labels[: len(short.labels)] == short.labels


def test_both_rules_agree_on_ordinary_conversations(tokenizer):
    words = ["What", "color", "is", "it", "104", "你好", "a", "red", "cup", "?"]
    generator = torch.Generator().manual_seed(0)
    for name in LEARNING:
        for _ in range(20):
            picks = torch.randint(len(words), (2, 4), generator=generator).tolist()
            question, answer = (" ".join(words[pick] for pick in row) for row in picks)
            turns = [("human", "<image>\n" + question), ("gpt", answer)]
            assert encode(turns, tokenizer, name) == as_the_original(turns, tokenizer, name)


def test_an_empty_answer_among_others_costs_only_itself(tokenizer):
    turns = [("human", "a"), ("gpt", "red"), ("human", "b"), ("gpt", "")]
    assert spans(encode(turns, tokenizer)) == [tokenizer.encode("red</s>", bos=False)]
    assert spans(as_the_original(turns, tokenizer)) == []  # the original masks the whole sample


def test_an_image_in_an_answer_is_not_learned(tokenizer):
    encoded = encode([("human", "show me"), ("gpt", "here <image>")], tokenizer)
    assert IMAGE_TOKEN_ID in encoded.ids
    assert IMAGE_TOKEN_ID not in encoded.labels
    assert encoded.labels[-1] == tokenizer.eos_id


@pytest.mark.parametrize("has_image", [True, False])
def test_an_answer_beyond_the_maximal_length_is_an_error(tokenizer, has_image):
    turns = [("human", "What is this?"), ("gpt", "a cup")]
    num_tokens = len(encode(turns, tokenizer, has_image=has_image).ids)
    num_answer = len(tokenizer.encode("a cup</s>", bos=False))
    shortest = num_tokens - num_answer + 1
    assert encode(turns, tokenizer, has_image=has_image, max_length=shortest)
    with pytest.raises(DataError, match=f"^x: no token of an answer within the first {shortest - 1} of"):
        encode(turns, tokenizer, has_image=has_image, max_length=shortest - 1, where="x")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no turn of 'human'"),
        ([("gpt", "a")], "no turn of 'human'"),
        ([("gpt", "a"), ("gpt", "b")], "turn 2 is from 'gpt', must be from 'human'"),
        ([("human", "a"), ("assistant", "b")], "turn 2 is from 'assistant'"),
        ([("human", "a"), ("gpt", None)], "turn 2 has no text but None"),
        ([("human", "a")], "no turn of 'gpt' follows one of 'human', so nothing can be learned"),
    ],
)
def test_turns_that_do_not_fit_are_an_error_that_names_the_sample(tokenizer, turns, message):
    with pytest.raises(DataError, match=f"^a.json 3: {message}"):
        encode(turns, tokenizer, where="a.json 3")


@pytest.mark.parametrize(
    "turns",
    [
        [("human", "no image"), ("gpt", "a")],
        [("human", "<image>")],
        [("human", "<image>"), ("gpt", "a"), ("human", "b"), ("gpt", "c")],
    ],
)
def test_the_plain_template_wants_one_image_and_one_answer(tokenizer, turns):
    with pytest.raises(DataError, match="^s: the plain template needs one question with <image>"):
        encode(turns, tokenizer, "plain", where="s")


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("a", "a"),
        (" a ", " a "),
        ("<image>", "<image>"),
        ("x <image> y", "<image>\nx  y"),
        ("<image><image>\nq\n", "<image>\nq"),
    ],
)
def test_an_image_token_moves_to_the_front(text, moved):
    assert move_image_token(text) == moved
    assert move_image_token(moved) == moved


def test_an_open_prompt_is_the_beginning_of_the_answered_one():
    for name in LEARNING:
        question = ("human", "<image>\nWhat?")
        answered = build_prompt([question, ("gpt", "a cup")], TEMPLATES[name])
        assert answered.startswith(build_prompt([question, ("gpt", None)], TEMPLATES[name]) + " a cup")


def test_a_batch_is_padded_to_its_longest_row_and_cut():
    samples = [Encoded([1, 5, 2], [-100, 5, 2]), Encoded([1, IMAGE_TOKEN_ID, 6, 7, 2], [-100, -100, -100, 7, 2])]
    batch = collate(samples, pad_id=0, max_length=4)
    assert batch["ids"].tolist() == [[1, 5, 2, 0], [1, IMAGE_TOKEN_ID, 6, 7]]
    assert batch["labels"].tolist() == [[-100, 5, 2, -100], [-100, -100, -100, 7]]
    assert batch["mask"].tolist() == [[True, True, True, False], [True] * 4]
    assert batch["mask"].dtype == torch.bool


@pytest.mark.parametrize("pad_id", [0, 2])
def test_the_padding_is_told_by_the_length_and_not_by_the_id(pad_id):
    """A literal <unk> and the </s> of an answer are tokens, whatever fills up."""
    samples = [Encoded([1, 0, 5, 2], [-100, -100, 5, 2]), Encoded([1, 6, 2], [-100, 6, 2])]
    batch = collate(samples, pad_id=pad_id, max_length=9)
    assert batch["mask"].tolist() == [[True] * 4, [True, True, True, False]]
    assert collate(samples[:1], pad_id=pad_id, max_length=9)["mask"].tolist() == [[True] * 4]
