"""Which files a BEiT-3 model takes, and what it says about the others."""

import pytest
import torch
from torch import Tensor, nn

from models.beit3.config import BEiT3Config
from models.beit3.loading import load_rule, prepare_beit3_state_dict
from models.beit3.tasks import BEiT3ForCaptioning, BEiT3ForVisualQuestionAnswering
from models.errors import ModelError
from models.loading import load_weights

POSITIONS = "beit3.encoder.embed_positions.A.weight"


def config(image_size: int = 32, *, vocab_size: int = 30, normalize_output: bool = False) -> BEiT3Config:
    sizes = {"embed_dim": 24, "num_layers": 1, "num_heads": 3, "max_text_positions": 12}
    return BEiT3Config(image_size, vocab_size=vocab_size, normalize_output=normalize_output, **sizes)


def vqa(image_size: int = 32, num_answers: int = 5) -> nn.Module:
    return BEiT3ForVisualQuestionAnswering(config(image_size), num_answers)


def pretrained() -> dict[str, Tensor]:
    """What a pre-training file holds: trunk with final norm, word head, image head."""
    state = BEiT3ForCaptioning(config(normalize_output=True)).state_dict()
    return {**state, "mim_head.weight": torch.zeros(2, 2), "mim_head.bias": torch.zeros(2)}


def test_a_bare_state_dict_is_taken_as_it_is():
    state = vqa().state_dict()
    assert prepare_beit3_state_dict(state, config()) == state


def test_a_prefix_is_stripped():
    state = vqa().state_dict()
    wrapped = {f"net.{name}": value for name, value in state.items()}
    assert prepare_beit3_state_dict(wrapped, config(), model_prefix="net") == state


def test_a_prefix_that_no_name_has_is_refused():
    with pytest.raises(ModelError, match="begins with --model_prefix 'net'"):
        prepare_beit3_state_dict(vqa().state_dict(), config(), model_prefix="net")


def test_names_behind_a_wrapper_get_the_flag_to_use():
    wrapped = {f"module.{name}": value for name, value in vqa().state_dict().items()}
    with pytest.raises(ModelError, match="give --model_prefix module$"):
        prepare_beit3_state_dict(wrapped, config())


def test_a_checkpoint_of_another_image_size_loads_into_a_larger_model():
    state = prepare_beit3_state_dict(vqa(32).state_dict(), config(64))
    assert state[POSITIONS].shape[0] == 3 + 16
    load_weights(vqa(64), state)


def test_preparing_leaves_the_checkpoint_as_it_was():
    checkpoint = vqa(32).state_dict()
    prepare_beit3_state_dict(checkpoint, config(64))
    assert checkpoint[POSITIONS].shape[0] == 3 + 4


def test_a_position_table_that_is_not_square_is_refused():
    state = vqa().state_dict()
    state[POSITIONS] = torch.zeros(3 + 5, 24)
    with pytest.raises(ModelError, match="5 patch rows"):
        prepare_beit3_state_dict(state, config())


def test_another_vocabulary_names_both_numbers():
    with pytest.raises(ModelError, match="30 vocabulary rows, the model 64010: use --vocab_size 30"):
        prepare_beit3_state_dict(vqa().state_dict(), config(vocab_size=64010))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("vision_model.embeddings.class_embedding", "VLE"),
        ("vlbert.word_embeddings.weight", "VL-BERT"),
        ("model.layers.0.mlp.up_proj.weight", "LLaVA"),
        ("blocks.0.attn.qkv.weight", "a plain vision transformer"),
        ("something.else", "no family known"),
    ],
)
def test_a_checkpoint_of_another_family_is_named(name: str, family: str):
    with pytest.raises(ModelError, match=f"not a BEiT-3 checkpoint.*{family}") as error:
        prepare_beit3_state_dict({name: torch.zeros(1)}, config())
    assert name in str(error.value)


def test_training_from_a_pretraining_file_starts_new_heads_and_reports_them():
    model = vqa()
    rule = load_rule("vqav2", for_training=True)
    report = load_weights(model, prepare_beit3_state_dict(pretrained(), config()), **vars(rule))
    heads = {name for name in model.state_dict() if name.startswith(("pooler.", "head."))}
    assert set(report.newly_initialised) == heads
    assert {name.split(".")[0] for name in report.ignored} == {"beit3", "mlm_head", "mim_head"}


def test_captioning_finds_its_head_in_a_pretraining_file():
    model = BEiT3ForCaptioning(config(normalize_output=True))
    rule = load_rule("coco_captioning", for_training=True)
    report = load_weights(model, prepare_beit3_state_dict(pretrained(), model.config), **vars(rule))
    assert report.newly_initialised == ()


def test_evaluating_a_pretraining_file_is_refused():
    rule = load_rule("vqav2", for_training=False)
    with pytest.raises(ModelError, match="10 missing from the file: head"):
        load_weights(vqa(), prepare_beit3_state_dict(pretrained(), config()), **vars(rule))


def test_training_on_another_answer_list_replaces_the_last_layer_only():
    rule = load_rule("vqav2", for_training=True)
    report = load_weights(vqa(num_answers=9), vqa(num_answers=5).state_dict(), **vars(rule))
    assert report.newly_initialised == ("head.3.bias", "head.3.weight")


def test_evaluating_with_another_answer_list_is_refused():
    rule = load_rule("vqav2", for_training=False)
    with pytest.raises(ModelError, match=r"head.3.bias \(5,\) in the file, \(9,\) in the model"):
        load_weights(vqa(num_answers=9), vqa(num_answers=5).state_dict(), **vars(rule))


def test_a_trunk_weight_may_never_miss():
    state = vqa().state_dict()
    del state["beit3.encoder.layers.0.ffn.A.fc1.weight"]
    with pytest.raises(ModelError, match="1 missing from the file: beit3.encoder.layers.0.ffn.A.fc1.weight"):
        load_weights(vqa(), state, **vars(load_rule("vqav2", for_training=True)))
