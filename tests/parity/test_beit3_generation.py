"""Captions found by our decoder against recorded ones of the original's beam search (float32, CPU).

Measured on the default recordings: ids equal, scores within 5e-7, logits of cached steps within 2e-6.
"""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from models.beit3.caption_cache import encode_images, next_word_logits
from models.beit3.decoding import DecodingSettings, Generated, SpecialTokens, generate
from models.beit3.tasks import BEiT3ForCaptioning
from tests.models.reference_beam_search import beam_search
from tests.parity.beit3_fixtures import config_of, with_weights
from tests.parity.fixture_files import load_fixture

SCORES = {"atol": 1e-5, "rtol": 1e-5}
LOGITS = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return load_fixture("beit3_generation.pt")


def model_of(recording: dict[str, Any]) -> BEiT3ForCaptioning:
    return with_weights(BEiT3ForCaptioning(config_of(recording["config"])), recording["state_dict"])


def tokens_of(config: dict[str, Any]) -> SpecialTokens:
    return SpecialTokens(*(config[f"{name}_token_id"] for name in ("bos", "pad", "eos", "mask")))


def settings_of(run: dict[str, Any]) -> DecodingSettings:
    return DecodingSettings(num_beams=run["num_beams"], length_penalty=run["length_penalty"], max_tokens=run["max_len"])


def decoded(recording: dict[str, Any], run: dict[str, Any], images: slice = slice(None)) -> Generated:
    image = recording["inputs"]["image"][images]
    return generate(model_of(recording), image, tokens_of(recording["config"]), settings_of(run))


def test_every_recorded_run_gives_the_same_ids_and_scores(recording):
    assert recording["outputs"]["runs"]
    for run in recording["outputs"]["runs"]:
        found = decoded(recording, run)
        assert found.ids.tolist() == run["decoded"].tolist()
        assert_close(found.scores, run["best_score"], **SCORES)


def test_a_batch_gives_what_its_images_give_alone(recording):
    for run in recording["outputs"]["runs"]:
        whole = decoded(recording, run)
        for place in range(len(whole.ids)):
            alone = decoded(recording, run, slice(place, place + 1))
            assert alone.ids.tolist() == whole.ids[place : place + 1].tolist()
            assert_close(alone.scores, whole.scores[place : place + 1], **SCORES)


def test_the_plain_search_of_the_tests_offers_the_recorded_captions_in_the_recorded_order(recording):
    """So that what is compared with it elsewhere is compared with the original."""
    for run in recording["outputs"]["runs"]:
        found = beam_search(
            model_of(recording), recording["inputs"]["image"], tokens_of(recording["config"]), settings_of(run)
        )
        assert [one.offered for one in found] == run["all_hypotheses_in_order"]
        assert [one.ids for one in found] == run["decoded"].tolist()


@torch.inference_mode()
def test_cached_steps_give_the_recorded_logits():
    recording = load_fixture("beit3_captioning.pt")
    model, forced = model_of(recording), recording["inputs"]["forced_tokens"]
    cache = encode_images(model, recording["inputs"]["image"], 1, forced.shape[1] + 2)
    bos = torch.full_like(forced[:, :1], recording["config"]["bos_token_id"])
    words = torch.cat([bos, forced], dim=1)
    mask_id = recording["config"]["mask_token_id"]
    for step, expected in enumerate(recording["outputs"]["step_logits"]):
        logits = next_word_logits(model, cache, words[:, step], mask_id, torch.tensor(step))
        assert_close(logits, expected, **LOGITS)
