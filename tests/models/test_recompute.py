"""Recomputed layers: what a policy says, and for every family the gradients and the memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.forecast import StepMemory
from models.beit3.beit3 import BEiT3
from models.beit3.config import BEiT3Config
from models.clip_vision import CLIPVisionConfig
from models.errors import ModelError
from models.llava.config import LlamaConfig, LlavaConfig
from models.llava.llama import IGNORED
from models.llava.llava import IMAGE_PLACE, LlavaForCausalLM
from models.lora import LoRAConfig, add_adapters
from models.losses import vqa_loss
from models.recompute import NOTHING, Recompute, set_recompute
from models.vlbert.vlbert import EncoderConfig, VLBertConfig
from models.vlbert.vqa import AdaptiveVQA, SpecialIds, VLBertForVQA
from models.vle.config import VLEConfig
from models.vle.vle import VLEForVQA
from tests.models.test_vle import TEXT, TINY, VISION

LAYERS = 4
POLICIES = ("none", "every_2", "full")  # from the most memory to the least
Step = tuple[nn.Module, Callable[[], Tensor]]


def test_a_policy_says_which_layers_and_is_written_as_it_is_read():
    covered = {text: [Recompute.parse(text).covers(index) for index in range(5)] for text in (*POLICIES, "every_3")}
    assert covered == {
        "none": [False] * 5,
        "every_2": [True, False, True, False, True],
        "full": [True] * 5,
        "every_3": [True, False, False, True, False],
    }
    assert all(str(Recompute.parse(text)) == text for text in covered)


@pytest.mark.parametrize("text", ["", "every_1", "every_0", "every_", "every_-2", "every_2.5", "Full", "all", "auto"])
def test_what_says_no_layers_is_refused(text):
    with pytest.raises(ModelError, match="none, full, or every_K with K of 2 or more"):
        Recompute.parse(text)


# ---- each family: a small model and its loss ----


def beit3(**more: object) -> Step:
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "vocab_size": 40}
    model = BEiT3(BEiT3Config(**sizes, max_text_positions=12, num_layers=LAYERS, drop_path=0.5, **more))
    image, text = torch.randn(4, 3, 32, 32), torch.randint(0, 40, (4, 6))
    return model, lambda: model(image, text, keep=(1, 0))[0].square().sum()


def llava(*, trains_tower: bool = False) -> Step:
    values = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
    text = LlamaConfig.from_dict({"vocab_size": 50, "max_position_embeddings": 64, **values})
    tower = CLIPVisionConfig(24, LAYERS, 2, 48, image_size=32, patch_size=8, attention_dropout=0.1)
    model = LlavaForCausalLM(LlavaConfig(text, mm_hidden_size=24), tower)
    model.requires_grad_(False)
    add_adapters(model.model.layers, LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.3))
    model.model.mm_projector.requires_grad_(True)
    model.tower.requires_grad_(trains_tower)
    ids, labels = torch.full((3, 12), 7), torch.full((3, 12), IGNORED)
    ids[:, 1], labels[:, -5:] = IMAGE_PLACE, 9
    pixels = torch.randn(3, 3, 32, 32)
    return model, lambda: model(ids, pixels, labels=labels).loss


def vle() -> Step:
    layers = {"num_hidden_layers": LAYERS}
    values = TINY | layers | {"text_config": TEXT | layers, "vision_config": VISION | layers}
    model = VLEForVQA(VLEConfig.from_dict(values))
    pixels, ids, targets = torch.randn(4, 3, 16, 16), torch.randint(1, 40, (4, 6)), torch.rand(4, 3)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return model, lambda: vqa_loss(model(pixels, ids, mask), targets)


def vlbert(strategy: str, *, reference: bool = False, **more: object) -> Step:
    def transformer(**encoder: object) -> VLBertConfig:
        sizes = {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 96}
        config = EncoderConfig(**sizes, **encoder)
        return VLBertConfig(encoder=config, visual_size=48, vocab_size=30, max_position_embeddings=60)

    config, ids = transformer(strategy=strategy, reference_behaviour=reference, **more), SpecialIds(1, 2, 3)
    decisions = config.encoder.num_decisions
    policy = VLBertForVQA(transformer(), 2 * decisions, special_ids=ids) if decisions else None
    model = AdaptiveVQA(config, 5, policy=policy, special_ids=ids)
    boxes, sizes = torch.rand(16, 3, 4 + 2048), torch.tensor([[100.0, 80.0]]).expand(16, -1)
    question, targets = torch.randint(4, 30, (16, 40)), torch.rand(16, 5)
    return model, lambda: vqa_loss(model(boxes, sizes, question).logits, targets)


FAMILIES: dict[str, Callable[[], Step]] = {
    "beit3": beit3,
    "llava": llava,
    "llava with its tower": lambda: llava(trains_tower=True),
    "vle": vle,
    "vlbert standard": lambda: vlbert("standard"),
    "vlbert pretrained_frozen": lambda: vlbert("pretrained_frozen"),
    "vlbert last_2": lambda: vlbert("last_2"),
    "vlbert SpotTune": lambda: vlbert("SpotTune"),
    "vlbert SpotTune as published": lambda: vlbert("SpotTune", reference=True),
    "vlbert SpotTune_Block": lambda: vlbert("SpotTune_Block"),
    "vlbert SpotTune_Block as published": lambda: vlbert("SpotTune_Block", reference=True),
    "vlbert BlockDrop": lambda: vlbert("BlockDrop"),
}


def build(name: str, policy: str) -> Step:
    torch.manual_seed(0)
    model, loss = FAMILIES[name]()
    set_recompute(model.train(), Recompute.parse(policy))
    return model, loss


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_without_bit_for_bit_and_so_are_later_draws(name):
    """With dropout, stochastic depth and drawn decisions on."""
    found = []
    for policy in POLICIES:
        model, loss = build(name, policy)
        torch.manual_seed(1)
        value = loss()
        value.backward()
        gradients = {part: weight.grad for part, weight in model.named_parameters() if weight.grad is not None}
        found.append((value.detach(), gradients, torch.rand(3)))
    value, gradients, drawn = found[0]
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 10
    for other, others, drawn_there in found[1:]:
        assert torch.equal(other, value)
        assert torch.equal(drawn_there, drawn)
        assert others.keys() == gradients.keys()
        assert all(torch.equal(others[part], gradients[part]) for part in gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_more_recomputed_layers_take_less_memory(name):
    peaks = []
    for policy in POLICIES:
        model, loss = build(name, policy)
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad])
        memory = StepMemory(optimizer, torch.device("cpu"))
        with memory:
            value = loss()
            kept = memory.now_bytes
            value.backward()
            optimizer.step()
        peaks.append((kept, memory.peak_bytes))
        del model, loss, optimizer, memory, value
    for place in (0, 1):
        most, middle, least = (pair[place] for pair in peaks)
        assert most > middle > least, peaks


def test_a_frozen_tower_is_not_recomputed(monkeypatch):
    model, loss = build("llava", "full")
    calls = []
    for layer in (*model.tower.encoder.layers, *model.model.layers):
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda *a, f=forward, key=layer: calls.append(key) or f(*a))
    loss().backward()
    assert [calls.count(layer) for layer in model.tower.encoder.layers] == [1] * len(model.tower.encoder.layers)
    assert [calls.count(layer) for layer in model.model.layers] == [2] * LAYERS


def test_recomputing_the_last_of_each_two_layers_would_take_more(monkeypatch):
    """Why the first of each K is recomputed: when the backward pass begins, all that is kept is still there."""
    peaks = []
    for offset in (0, 1):
        monkeypatch.setattr(Recompute, "covers", lambda self, index, offset=offset: index % 2 == offset)
        model, loss = build("vlbert standard", "every_2")
        optimizer = torch.optim.SGD(model.parameters())
        with StepMemory(optimizer, torch.device("cpu")) as memory:
            loss().backward()
            optimizer.step()
        peaks.append(memory.peak_bytes)
        del model, loss, optimizer, memory
    assert peaks[0] < peaks[1]


def test_without_gradients_nothing_is_recomputed():
    assert NOTHING == Recompute.parse("none")
    calls = []
    with torch.no_grad():
        Recompute(1).run(0, lambda x: calls.append(x) or x, torch.ones(2, requires_grad=True), draws=True)
    assert len(calls) == 1
