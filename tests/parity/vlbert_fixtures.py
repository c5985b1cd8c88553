"""Build our VL-BERT models from the sizes and weights of a recording, and compare as the recordings are meant."""

from typing import Any

from torch import Tensor, nn

from models.loading import load_weights
from models.vlbert.vlbert import EncoderConfig, VLBertConfig
from models.vlbert.vqa import SpecialIds, VLBertForVQA

FORWARD, GRADIENT = 1e-5, 1e-4  # of the largest absolute value

# The same where region vectors are made from features: in the recordings they are large numbers that differ little
# (2000 give or take 20), so the norm behind them makes a hundredfold of their rounding, which another processor does
# otherwise. Vectors changed by one rounding, 1.2e-7, move logits by up to 1.7e-4 and gradients by up to 1.9e-3; the
# recording itself is 3.2e-5 away from the same arithmetic in float64.
ROUNDED_FORWARD, ROUNDED_GRADIENT = 5e-4, 5e-3


def encoder_config(values: dict[str, Any], strategy: str = "standard", **more: Any) -> EncoderConfig:
    """Sizes of a recording, without dropout."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {name: values[name] for name in names}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return EncoderConfig(**sizes, **no_dropout, strategy=strategy, **more)


def transformer_config(values: dict[str, Any], **more: Any) -> VLBertConfig:
    """Sizes of a recorded ``VLBERT`` section."""
    names = ("visual_size", "vocab_size", "max_position_embeddings", "type_vocab_size", "visual_ln", "with_pooler")
    return VLBertConfig(encoder=encoder_config(values, **more), **{name: values[name] for name in names})


def vqa_model(
    config: dict[str, Any],
    state: dict[str, Tensor],
    section: str,
    num_outputs: int,
    *,
    regions: nn.Module | None = None,
    **more: Any,
) -> nn.Module:
    """A question-answering model, or a policy; on precomputed features without ``regions``."""
    vocab = config["vocab"]
    model = VLBertForVQA(
        transformer_config(config[section], **more),
        num_outputs,
        classifier=config["CLASSIFIER_TYPE"],
        classifier_hidden_size=config.get("CLASSIFIER_HIDDEN_SIZE", 1024),
        classifier_dropout=0.0,
        regions=regions,
        special_ids=SpecialIds(*(vocab.index(token) for token in ("[CLS]", "[SEP]", "[MASK]"))),
    )
    model.image_feature_extractor.obj_downsample[0].p = 0.0
    load_weights(model, state)
    return model


def use_recorded_regions(model: nn.Module, vectors: Tensor) -> None:
    """From here on the model's region vectors are the recorded ones, to the last bit, with the gradient of its own."""

    def replace(module: nn.Module, inputs: Any, own: Tensor) -> Tensor:
        assert_near(own, vectors, "region vectors", share=1e-6)
        replaced = own + (vectors - own).detach()
        assert (replaced == vectors).all()  # numbers so near differ by what float32 can say
        return replaced

    model.image_feature_extractor.register_forward_hook(replace)


def assert_near(found: Tensor, expected: Tensor, what: str = "", *, share: float = FORWARD) -> None:
    """Compare relative to the largest value of the recording."""
    largest = max(expected.abs().max().item(), 1e-6)
    assert found.shape == expected.shape, what
    assert (found - expected).abs().max().item() <= share * largest, what


def assert_grads(model: nn.Module, recorded: dict[str, Tensor], *, share: float = GRADIENT) -> None:
    """Compare gradients of some parameters."""
    parameters = dict(model.named_parameters())
    for name, expected in recorded.items():
        assert_near(parameters[name].grad, expected, name, share=share)


def assert_grad_norms(model: nn.Module, recorded: dict[str, float], *, share: float = GRADIENT) -> None:
    """Compare the length of every gradient."""
    parameters = dict(model.named_parameters())
    for name, expected in recorded.items():
        grad = parameters[name].grad
        found = 0.0 if grad is None else grad.norm().item()
        assert abs(found - expected) <= share * max(expected, 1e-2), name


def clear(model: nn.Module) -> None:
    """Forget the gradients."""
    for parameter in model.parameters():
        parameter.grad = None
