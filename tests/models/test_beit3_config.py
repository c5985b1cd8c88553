import pytest
import torch

from models.beit3.config import TASK_SUFFIXES, BEiT3Config, beit3_config, model_names
from models.beit3.tasks import build_beit3
from models.errors import ModelError

# (model, task) -> parameters of the original
PARAMETERS = {
    ("beit3_base_patch16_480", "vqav2"): 228_110_649,
    ("beit3_base_patch16_384", "vqav2"): 227_861_817,
    ("beit3_base_patch16_480", "coco_captioning"): 270_751_754,
    ("beit3_base_patch16_224", "nocaps"): 270_211_082,
    ("beit3_large_patch16_480", "vqav2"): 682_985_529,
    ("beit3_large_patch16_768", "vqav2"): 684_423_225,
    ("beit3_large_patch16_480", "coco_captioning"): 739_033_610,
    ("beit3_base_patch16_224", "nlvr2"): 225_719_810,
    ("beit3_base_patch16_224", "imagenet"): 221_754_856,
    ("beit3_base_patch16_384", "flickr30k"): 222_458_881,
    ("beit3_large_patch16_224", "nlvr2"): 681_109_506,
    ("beit3_large_patch16_224", "imagenet"): 673_725_416,
    ("beit3_large_patch16_384", "coco_retrieval"): 675_188_737,
}
NUM_KEYS = {"vqav2": 497, "coco_captioning": 493, "nlvr2": 499, "imagenet": 491, "coco_retrieval": 494}


@pytest.mark.parametrize(("name", "task"), PARAMETERS)
def test_models_have_the_exact_number_of_parameters(name: str, task: str):
    with torch.device("meta"):
        model = build_beit3(task, beit3_config(name, task), num_classes=3129 if task == "vqav2" else None)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name, task]


@pytest.mark.parametrize("task", NUM_KEYS)
def test_base_models_have_the_exact_number_of_names(task: str):
    with torch.device("meta"):
        config = beit3_config("beit3_base_patch16_224", task)
        model = build_beit3(task, config, num_classes=3129 if task == "vqav2" else None)
    assert len(model.state_dict()) == NUM_KEYS[task]


@pytest.mark.parametrize("task", TASK_SUFFIXES)
def test_only_question_answering_and_classification_go_without_final_norm(task: str):
    config = beit3_config("beit3_base_patch16_224", task)
    assert config.normalize_output == (task not in ("vqav2", "imagenet"))


def test_the_task_suffix_in_the_name_is_accepted():
    assert beit3_config("beit3_large_patch16_480_vqav2", "vqav2") == beit3_config("beit3_large_patch16_480", "vqav2")


def test_a_suffix_of_another_task_is_refused_with_the_right_name():
    with pytest.raises(ModelError, match="use beit3_base_patch16_480_captioning"):
        beit3_config("beit3_base_patch16_480_vqav2", "coco_captioning")


def test_image_sizes_that_were_never_published_are_allowed():
    assert beit3_config("beit3_base_patch16_512", "vqav2").num_patches == 32 * 32


def test_tiny_is_the_size_of_the_quick_start():
    config = beit3_config("beit3_tiny_patch32_96", "vqav2", vocab_size=100)
    assert (config.num_layers, config.embed_dim, config.num_heads) == (3, 96, 4)
    assert (config.start.linear, config.num_image_tokens, config.vocab_size) == (0.16, 10, 100)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit3_base_patch16_480_vqa", "beit3_huge", ""])
def test_an_unknown_name_lists_the_names_of_the_task(name: str):
    with pytest.raises(ModelError, match="beit3_large_patch16_768") as error:
        beit3_config(name, "vqav2")
    assert repr(name) in str(error.value)


def test_an_unknown_name_close_to_a_known_one_gets_a_hint():
    with pytest.raises(ModelError, match=r"did you mean beit3_base_patch16_480\?"):
        beit3_config("beit3_base_patch16_48O", "vqav2")


def test_another_input_size_than_the_model_names_both():
    with pytest.raises(ModelError, match=r"--input_size 384 is not the image size 480"):
        beit3_config("beit3_base_patch16_480", "vqav2", image_size=384)


def test_an_image_size_that_the_patch_does_not_divide_names_both():
    with pytest.raises(ModelError, match="image size 490 is not a multiple of the patch size 16"):
        beit3_config("beit3_base_patch16_490", "vqav2")


def test_an_unknown_task_lists_the_tasks():
    with pytest.raises(ModelError, match="'vqa'.*vqav2, coco_captioning"):
        beit3_config("beit3_base_patch16_480", "vqa")


@pytest.mark.parametrize(
    ("field", "value"), [("drop_path", 1.0), ("drop_path", -0.1), ("num_heads", 7), ("vocab_size", 0)]
)
def test_impossible_sizes_are_refused(field: str, value: float):
    with pytest.raises(ModelError, match=str(value)):
        BEiT3Config(**{"image_size": 32, field: value})


def test_question_answering_needs_the_number_of_answers():
    with pytest.raises(ModelError, match="answer2label"):
        build_beit3("vqav2", beit3_config("beit3_tiny_patch32_96", "vqav2"))


def test_offered_names_can_all_be_built():
    for task, suffix in TASK_SUFFIXES.items():
        assert all(beit3_config(name, task) for name in model_names(suffix))
