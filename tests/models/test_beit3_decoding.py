import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from models.beit3 import decoding
from models.beit3.config import BEiT3Config, StartValues
from models.beit3.decoding import DecodingSettings, SpecialTokens, generate
from models.beit3.tasks import BEiT3ForCaptioning
from models.errors import ModelError
from tests.models.reference_beam_search import beam_search

TOKENS = SpecialTokens(bos=0, pad=1, eos=2, mask=29)


def captioner(seed: int, *, vocab_size: int = 30, eos_bias: float = 0.0, scale: float = 4.0) -> BEiT3ForCaptioning:
    """Random weights whose words depend on the image and on one another; ``eos_bias`` moves the usual length."""
    torch.manual_seed(seed)
    config = BEiT3Config(
        image_size=16, patch_size=8, embed_dim=16, num_layers=2, num_heads=2, mlp_ratio=2, vocab_size=vocab_size,
        max_text_positions=20, normalize_output=True, start=StartValues(linear=0.3, words=1.0),
    )  # fmt: skip
    model = BEiT3ForCaptioning(config).eval()
    with torch.no_grad():
        model.mlm_head.weight.mul_(scale)
        model.mlm_head.bias[TOKENS.eos] = eos_bias
    return model


def images(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


CASES = list(itertools.product((1, 2, 3, 5), (0.0, 0.6, 1.0, 2.0), (3, 4, 9, 16)))


@pytest.mark.parametrize(("num_beams", "length_penalty", "max_tokens"), CASES)
def test_the_batched_search_finds_what_the_plain_one_finds(num_beams, length_penalty, max_tokens):
    settings = DecodingSettings(num_beams=num_beams, length_penalty=length_penalty, max_tokens=max_tokens)
    for seed, eos_bias in ((1, 0.0), (2, 2.5), (3, 4.0)):
        model, image = captioner(seed, eos_bias=eos_bias), images(4, seed)
        found, plain = generate(model, image, TOKENS, settings), beam_search(model, image, TOKENS, settings)
        assert found.ids.tolist() == [one.ids for one in plain]
        assert_close(found.scores, torch.tensor([one.score for one in plain]), atol=1e-5, rtol=1e-5)


def test_the_cases_have_captions_of_many_lengths_so_that_images_leave_at_different_steps():
    lengths = set()
    for seed, eos_bias in ((1, 0.0), (2, 2.5), (3, 4.0)):
        ids = generate(captioner(seed, eos_bias=eos_bias), images(4, seed), TOKENS, DecodingSettings(max_tokens=16)).ids
        lengths |= set((ids != TOKENS.pad).sum(dim=1).tolist())
    assert len(lengths) >= 4
    assert 16 in lengths


def test_a_search_goes_on_with_the_next_best_word_after_an_end_so_one_beam_is_not_greedy():
    settings = {"num_beams": 1, "length_penalty": 2.0, "max_tokens": 16}
    model, image = captioner(2, eos_bias=2.5), images(8, 2)
    beam, greedy = (
        generate(model, image, TOKENS, DecodingSettings(method=method, **settings)) for method in ("beam", "greedy")
    )
    assert (beam.scores >= greedy.scores - 1e-6).all()
    assert beam.ids.tolist() != greedy.ids.tolist()


@torch.inference_mode()
def test_greedy_takes_the_most_probable_word_until_the_end():
    model, image = captioner(2, eos_bias=2.5), images(5, 2)
    found = generate(model, image, TOKENS, DecodingSettings(method="greedy", max_tokens=16))
    for one, ids in zip(image.split(1), found.ids.tolist(), strict=True):
        words = [TOKENS.bos]
        while len(words) + 2 < 16:
            word = int(model(one, torch.tensor([[*words, TOKENS.mask]]))[0, -1].argmax())
            if word == TOKENS.eos:
                break
            words.append(word)
        expected = [*words, TOKENS.mask, TOKENS.eos]
        assert ids == expected + [TOKENS.pad] * (16 - len(expected))


def nucleus(seeds, *, number=6, **settings):
    model = captioner(4, scale=1.5)
    settings = DecodingSettings(method="nucleus", max_tokens=12, **settings)
    return generate(model, images(1).expand(number, -1, -1, -1), TOKENS, settings, seeds=torch.tensor(seeds)).ids


def test_draws_depend_on_the_seed_of_the_image_and_not_on_the_batch():
    whole = nucleus([5, 6, 7, 8, 9, 5]).tolist()
    assert whole[0] == whole[5]
    assert len({tuple(ids) for ids in whole}) == 5
    assert nucleus([8, 6], number=2).tolist() == [whole[3], whole[1]]


def test_a_nucleus_of_almost_nothing_or_a_cold_one_is_greedy():
    greedy = generate(captioner(4, scale=1.5), images(1), TOKENS, DecodingSettings(method="greedy", max_tokens=12)).ids
    for settings in ({"top_p": 1e-6}, {"temperature": 1e-4}):
        assert nucleus([1, 2, 3], number=3, **settings).tolist() == greedy.expand(3, -1).tolist()


def test_words_are_drawn_from_the_nucleus_in_proportion_to_their_probability():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    draws = decoding._uniform(torch.arange(20000), 3)
    words = decoding._draw_from_nucleus(logits, draws, 0.75, 1.0).squeeze(1)
    shares = words.bincount(minlength=4) / 20000
    assert_close(shares, torch.tensor([5 / 8, 3 / 8, 0.0, 0.0]), atol=0.015, rtol=0)


def test_uniform_draws_are_uniform_and_differ_from_step_to_step():
    draws = torch.stack([decoding._uniform(torch.arange(-5000, 5000), step) for step in range(3)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert_close(draws.mean(dim=1), torch.full((3,), 0.5), atol=0.015, rtol=0)
    assert_close(draws.var(dim=1), torch.full((3,), 1 / 12), atol=0.01, rtol=0)
    assert torch.corrcoef(draws).fill_diagonal_(0).abs().max() < 0.05


def test_the_image_goes_through_the_model_once_whatever_the_number_of_beams(monkeypatch):
    model, sizes = captioner(1), []
    model.beit3.encoder.layers[0].ffn.A.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape[0]))
    generate(model, images(3), TOKENS, DecodingSettings(num_beams=4, max_tokens=12))
    assert sizes == [3]


def test_finished_images_leave_the_batch():
    model, rows = captioner(2, eos_bias=4.0), []
    model.mlm_head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[0]))
    generate(model, images(8, 2), TOKENS, DecodingSettings(num_beams=2, max_tokens=16))
    assert rows[0] == 16
    assert rows[-1] < 16
    assert rows == sorted(rows, reverse=True)


def test_all_steps_are_taken_where_another_process_still_needs_them():
    model, calls = captioner(3, eos_bias=8.0), []
    model.mlm_head.register_forward_hook(lambda module, inputs, out: calls.append(1))
    settings = DecodingSettings(num_beams=2, max_tokens=12)
    alone = generate(model, images(2), TOKENS, settings)
    assert len(calls) < 10
    calls.clear()
    told = []

    def agree(done):
        told.append(done)
        return len(told) == 10

    together = generate(model, images(2), TOKENS, settings, agree_done=agree)
    assert len(calls) == 10
    assert together.ids.tolist() == alone.ids.tolist()
    assert told[-1]


def test_a_compiled_step_finds_the_same_captions():
    model, image = captioner(2, eos_bias=2.5), images(3, 2)
    settings = {"num_beams": 2, "max_tokens": 8}
    plain, compiled = (
        generate(model, image, TOKENS, DecodingSettings(compile=compile, **settings)) for compile in (False, True)
    )
    assert compiled.ids.tolist() == plain.ids.tolist()
    assert_close(compiled.scores, plain.scores)


def test_bfloat16_gives_whole_captions_with_finite_scores():
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(captioner(2, eos_bias=2.5), images(3, 2), TOKENS, DecodingSettings(max_tokens=16))
    assert found.scores.isfinite().all()
    assert found.scores.dtype == torch.float32
    assert (found.ids[:, 0] == TOKENS.bos).all()


@pytest.mark.parametrize("method", decoding.METHODS)
def test_weights_that_are_not_finite_end_in_scores_that_are_not(method):
    model = captioner(1)
    with torch.no_grad():
        model.mlm_head.weight.fill_(math.nan)
    found = generate(model, images(2), TOKENS, DecodingSettings(method=method, max_tokens=8))
    assert not found.scores.isfinite().any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, "unknown decoding 'best': choose one of beam, greedy, nucleus"),
        ({"num_beams": 0}, "--num_beams must be at least 1, got 0"),
        ({"max_tokens": 2}, "--num_max_bpe_tokens must be at least 3 for captions, got 2"),
        ({"top_p": 0}, r"--top_p must be in \(0, 1\], got 0"),
        ({"temperature": 0}, "--temperature must be above 0, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        DecodingSettings(**settings)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ModelError, match="a text of 19 tokens is longer than the 18 positions"):
        generate(captioner(1), images(1), TOKENS, DecodingSettings(max_tokens=19))


def test_a_vocabulary_that_is_smaller_than_the_candidates_can_still_be_searched():
    model = captioner(1, vocab_size=4, eos_bias=1.0)
    tokens = SpecialTokens(bos=0, pad=1, eos=2, mask=3)
    settings = DecodingSettings(num_beams=3, max_tokens=8)
    found, plain = generate(model, images(3), tokens, settings), beam_search(model, images(3), tokens, settings)
    assert found.ids.tolist() == [one.ids for one in plain]
