"""Our VL-BERT against numbers recorded from the originals (float32, CPU, no dropout).

Tolerance: 1e-5 of the largest value forward, 1e-4 for gradients; from features of regions 5e-4 forward, for a reason
that ``vlbert_fixtures`` has, and 1e-5 from the recorded vectors of those regions. Gradients of key biases are zero and
not compared.
"""

import zlib

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from engine.optim import TransformersAdamW
from models.loading import load_weights
from models.losses import vqa_loss
from models.vlbert.fast_rcnn import FastRCNN, FastRCNNConfig, blocks_of, without_aliases
from models.vlbert.vlbert import VisualLinguisticBert
from models.vlbert.vqa import VLBertForVQA, coordinate_embedding
from tests.parity.fixture_files import load_fixture
from tests.parity.vlbert_fixtures import (
    ROUNDED_FORWARD,
    assert_grad_norms,
    assert_grads,
    assert_near,
    transformer_config,
    use_recorded_regions,
    vqa_model,
)


@pytest.mark.parametrize("name", ["ln", "scale"])
def test_transformer(name):
    recording = load_fixture(f"vlbert_core_{name}.pt")
    config, inputs, outputs = transformer_config(recording["config"]), recording["inputs"], recording["outputs"]
    model = VisualLinguisticBert(config)
    load_weights(model, recording["state_dict"])
    visual, words = inputs["object_vl_embeddings"].split([config.visual_size, config.hidden_size], dim=2)
    found = model(
        inputs["text_input_ids"],
        inputs["text_token_type_ids"],
        inputs["text_visual_embeddings"],
        inputs["text_mask"],
        visual,
        words,
        inputs["object_mask"],
    )
    assert_near(found.packed, outputs["embedding"], "embedding")
    for layer, expected in zip(found.layers, outputs["all_layers"], strict=True):
        assert_near(layer, expected, "layers")
    assert_near(found.text, outputs["text_out"], "text")
    assert_near(found.regions, outputs["object_out"], "regions")
    assert_near(found.pooled, outputs["pooled"], "pooled")
    parts = ((found.text, "w_text"), (found.regions, "w_object"), (found.pooled, "w_pooled"))
    terms = torch.cat([(values * inputs[name]).flatten() for values, name in parts])
    loss = terms.sum()
    assert (loss - recording["loss"]).abs() <= 1e-6 * terms.abs().sum()  # they cancel out, to 0.4 % of that
    loss.backward()
    assert_grads(model, recording["grads"])


def test_coordinate_embedding():
    recording = load_fixture("vlbert_coords.pt")
    boxes = recording["inputs"]["boxes"]
    for name, expected in recording["outputs"].items():
        found = coordinate_embedding(boxes[:, :4], boxes[:, 4:], expected.shape[-1] // 2)
        assert (found - expected).abs().max() <= 2e-4, name  # angles of up to 100: the last bits of a float32 sine


@pytest.mark.parametrize("head", ["mlm", "2fc", "1fc"])
def test_question_answering_on_precomputed_features(head):
    recording = load_fixture(f"vlbert_vqa_prec_{head}.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    model = vqa_model(config, recording["state_dict"], "VLBERT", config["ANSWER_VOCAB_SIZE"])
    batch = inputs["boxes"], inputs["im_info"], inputs["question"]
    assert_near(model(*batch), outputs["label_logits"], "logits from its own regions", share=ROUNDED_FORWARD)
    use_recorded_regions(model, outputs["obj_reps"])
    logits = model(*batch)
    assert_near(logits, outputs["label_logits"], "logits")
    loss = vqa_loss(logits, inputs["label"])
    assert_near(loss, outputs["ans_loss"], "loss")
    score = inputs["label"].gather(1, logits.argmax(dim=1, keepdim=True)).mean()
    assert score.item() == pytest.approx(outputs["soft_acc"])
    loss.backward()
    assert_grads(model, {name: value for name, value in recording["grads"].items() if not name.endswith("key.bias")})
    norms = {name: value for name, value in recording["grad_norms"].items() if not name.endswith("key.bias")}
    assert_grad_norms(model, norms)


def test_four_training_steps():
    """Schedule, clip, then the optimizer, as the original orders them."""
    recording = load_fixture("vlbert_vqa_prec_mlm.pt")
    config, inputs, train = recording["config"], recording["inputs"], recording["train4"]
    model = vqa_model(config, recording["state_dict"], "VLBERT", config["ANSWER_VOCAB_SIZE"])
    groups = [{"params": list(model.parameters()), "weight_decay": train["weight_decay"]}]
    optimizer = TransformersAdamW(groups, lr=train["base_lr"], betas=(0.9, 0.999), eps=1e-6)
    for step, (loss_there, rate, norm) in enumerate(
        zip(train["losses"], train["lrs"], train["total_norms"], strict=True), start=1
    ):
        warmup, total = train["warmup_steps"], train["t_total"]
        factor = step / warmup if step < warmup else max(0.0, (total - step) / max(1, total - warmup))
        optimizer.param_groups[0]["lr"] = train["base_lr"] * factor
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
        optimizer.zero_grad()
        loss = vqa_loss(model(inputs["boxes"], inputs["im_info"], inputs["question"]), inputs["label"])
        assert loss.item() == pytest.approx(loss_there, rel=1e-4)
        loss.backward()
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip_grad_norm"])
        assert found.item() == pytest.approx(norm, rel=1e-3)
        optimizer.step()
    parameters = dict(model.named_parameters())
    for name, expected in train["after"].items():
        if not name.endswith("key.bias"):
            assert_near(parameters[name].detach(), expected, name, share=1e-3)


def cnn_config(config, **more) -> FastRCNNConfig:
    return FastRCNNConfig(
        blocks=(*config["stage_blocks"], config["head_blocks"]),
        stem_width=config["stem_width"],
        stride_in_1x1=config["IMAGE_STRIDE_IN_1x1"],
        dilated=config["IMAGE_C5_DILATED"],
        frozen_batch_norm=config["IMAGE_FROZEN_BN"],
        frozen_stages=tuple(config["IMAGE_FROZEN_BACKBONE_STAGES"]),
        **more,
    )


def network_input(images):
    return images.float() / 64 - 2


@pytest.mark.parametrize("kind", ["dilated", "strided"])
def test_image_path(kind):
    recording = load_fixture(f"vlbert_fastrcnn_{kind}.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    model = FastRCNN(config["IMAGE_FINAL_DIM"], cnn_config(config))
    load_weights(model, recording["state_dict"])
    model.train()
    model.obj_downsample[0].p = 0.0
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == set(recording["trainable"])
    assert {name for name, _ in model.named_parameters()} - trains == set(recording["frozen"])
    image, mask = network_input(inputs["images_u8"]), inputs["box_mask"].bool()
    assert_near(model.feature_map(image), outputs["body4"], "feature map")
    raw = model.region_features(image, inputs["boxes"], mask)
    assert_near(raw, outputs["obj_reps_raw"][mask], "raw")
    vectors = model(image, inputs["boxes"], inputs["im_info"][:, :2], mask)
    assert_near(vectors, outputs["obj_reps"], "vectors", share=1e-4)
    loss = (vectors * inputs["w"]).sum()
    loss.backward()
    for name, expected in recording["grads"].items():
        assert_near(dict(model.named_parameters())[name].grad, expected, name, share=1e-3)


def test_roi_align_is_the_originals():
    recording = load_fixture("vlbert_roialign.pt")
    inputs, outputs, scale = recording["inputs"], recording["outputs"], recording["config"]["spatial_scale"]
    x = inputs["x"].clone().requires_grad_()
    for name, size, ratio in (("out14_ratio1", (14, 14), 1), ("out5x3_ratio2", (5, 3), 2), ("out4_ratio0", (4, 4), 0)):
        found = roi_align(x, inputs["rois"], size, scale, ratio, aligned=False)
        assert_near(found, outputs[name], name, share=1e-6)
    (roi_align(x, inputs["rois"], (14, 14), scale, 1, aligned=False) * inputs["w"]).sum().backward()
    assert_near(x.grad, recording["grads"]["x"], "x")


def test_question_answering_from_the_image():
    recording = load_fixture("vlbert_vqa_e2e.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    regions = FastRCNN(config["VLBERT"]["visual_size"], cnn_config(config))
    model = vqa_model(config, recording["state_dict"], "VLBERT", config["ANSWER_VOCAB_SIZE"], regions=regions)
    batch = inputs["boxes"], inputs["im_info"], inputs["question"], None, network_input(inputs["images_u8"])
    with torch.no_grad():
        assert_near(model.eval()(*batch), outputs["label_logits"], "logits", share=1e-4)
    logits = model.train()(*batch)
    assert_near(logits, outputs["train_logits"], "train logits", share=1e-4)
    loss = vqa_loss(logits, inputs["label"])
    assert_near(loss, outputs["ans_loss"], "loss", share=1e-4)
    loss.backward()
    parameters = dict(model.named_parameters())
    for name, expected in recording["grads"].items():
        if not name.endswith("key.bias"):
            assert_near(parameters[name].grad, expected, name, share=1e-3)


def hashed(name: str, shape: torch.Size) -> torch.Tensor:
    """The recording's rule for weights."""
    count = int(np.prod(shape, dtype=np.int64))
    h = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))) % 2**32
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) % 2**32
    u = (h ^ (h >> np.uint64(16))).astype(np.float64) / 2**32
    if name.endswith("running_var"):
        values = 0.5 + u
    elif name.endswith(("running_mean", "bias")):
        values = (u - 0.5) * 0.2
    elif len(shape) == 1:
        values = 0.05 + 0.1 * u if "bn3" in name else 0.2 + 0.4 * u if "downsample" in name else 0.5 + u
    else:
        values = (u - 0.5) * 2 * np.sqrt(6 / (count / shape[0]))
    return torch.from_numpy(values.astype(np.float32)).view(shape)


@pytest.mark.parametrize("depth", [50, 101])
def test_resnets_of_full_size(depth):
    recording = load_fixture(f"vlbert_resnet{depth}_hashed.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    assert config["IMAGE_NUM_LAYERS"] == depth
    shape = {"stride_in_1x1": config["IMAGE_STRIDE_IN_1x1"], "dilated": config["IMAGE_C5_DILATED"]}
    model = FastRCNN(config["IMAGE_FINAL_DIM"], FastRCNNConfig(blocks=tuple(blocks_of(depth)), **shape)).eval()
    state = {}
    for name, value in model.state_dict().items():
        there = name.removeprefix("backbone.").replace("roi_head_feature_extractor.", "layer4.")
        if name.startswith("obj_downsample"):
            there = f"image_feature_extractor.{name}"
        counter = name.endswith("num_batches_tracked")
        state[name] = torch.zeros_like(value) if counter else hashed(there, value.shape)
    load_weights(model, state)
    means = torch.tensor(config["PIXEL_MEANS"])[:, None, None]
    image, mask = (inputs["images_u8"].float() - means) / 64, inputs["box_mask"].bool()
    with torch.no_grad():
        assert_near(model.feature_map(image)[:, ::64], outputs["body4_every_64th_channel"], "map", share=1e-4)
        raw = model.region_features(image, inputs["boxes"], mask)
        assert_near(raw, outputs["obj_reps_raw"][mask], "raw", share=1e-4)
        vectors = model(image, inputs["boxes"], inputs["im_info"][:, :2], mask)
        assert_near(vectors, outputs["obj_reps"], "vectors", share=1e-4)


FULL = {"max_position_embeddings": 512, "vocab_size": 30522, "type_vocab_size": 3, "visual_ln": True}
BASE = {"hidden_size": 768, "visual_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE = {"hidden_size": 1024, "visual_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
KINDS = {
    "base_precomputed_standard": (BASE | {"intermediate_size": 3072}, 3129, "standard", False),
    "base_precomputed_SpotTune": (BASE | {"intermediate_size": 3072}, 3129, "SpotTune", False),
    "base_precomputed_SpotTune_Block": (BASE | {"intermediate_size": 3072}, 3129, "SpotTune_Block", False),
    "base_precomputed_pretrained_frozen": (BASE | {"intermediate_size": 3072}, 3129, "pretrained_frozen", False),
    "base_precomputed_last_4": (BASE | {"intermediate_size": 3072}, 3129, "last_4", False),
    "base_image_standard": (BASE | {"intermediate_size": 3072}, 3129, "standard", True),
    "large_precomputed_standard": (LARGE | {"intermediate_size": 4096}, 3129, "standard", False),
    "policy_base_24": (BASE | {"intermediate_size": 512, "num_hidden_layers": 2}, 24, "standard", False),
    "policy_base_360": (BASE | {"intermediate_size": 512, "num_hidden_layers": 2}, 360, "standard", False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_full_size_models_have_the_recorded_names_shapes_and_parameter_counts(kind):
    recorded = load_fixture("vlbert_keys.pt")["outputs"][kind]
    sizes, num_outputs, strategy, from_image = KINDS[kind]
    config = transformer_config(FULL | sizes | {"with_pooler": False}, strategy=strategy)
    with torch.device("meta"):
        regions = FastRCNN(config.visual_size, FastRCNNConfig()) if from_image else None
        model = VLBertForVQA(config, num_outputs, regions=regions)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == recorded["params"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == recorded["trainable"]
    if "keys" in recorded:
        published = {name: tuple(shape) for name, shape in dict(recorded["keys"]).items()}
        assert (without_aliases(published) != published) == from_image
        found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert found == without_aliases(published)
