"""Region vectors from the image itself: a ResNet, ROIAlign, the ResNet's last stage on each region.

Source: VL-BERT's ``FastRCNN`` and ResNet; key names below ``image_feature_extractor.``. The original also lists the
head's weights a second time, as ``head.0.*``: ``without_aliases`` drops those.

Letters: B batch, K regions, R valid regions of the whole batch, W width of the vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from models.errors import ModelError
from models.linear import Linear
from models.vlbert.vqa import DROPOUT, coordinate_embedding

HEAD, HEAD_ALIAS = "roi_head_feature_extractor.", "head.0."
_COORDINATES = 2048
_ROI_SIDE, _STRIDE, _EXPANSION = 14, 16, 4
DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # blocks of layer1 to layer4


@dataclass(frozen=True)
class FastRCNNConfig:
    """Geometry; the published models have ``stem_width`` 64 and three blocks in the head.

    Attributes:
        blocks: of layer1, layer2, layer3 and the head.
        stem_width: channels of the stem; stages have 1, 2 and 4, the head 8 times as many, times 4 at their end.
        stride_in_1x1: the first block of a stage has its stride in the first convolution, not in the second.
        dilated: the head keeps the size of the regions and looks farther instead.
        frozen_batch_norm: batch norms keep their statistics and do not train.
        frozen_stages: parts that do not train: 1 the stem, 2 to 4 layer1 to layer3, 5 the head.
    """

    blocks: tuple[int, int, int, int] = DEPTHS[101]
    stem_width: int = 64
    stride_in_1x1: bool = True
    dilated: bool = True
    frozen_batch_norm: bool = True
    frozen_stages: tuple[int, ...] = (1, 2)


class FastRCNN(nn.Module):
    """Image and boxes to region vectors."""

    def __init__(self, width: int, config: FastRCNNConfig) -> None:
        """``width`` of the vectors."""
        super().__init__()
        self.config = config
        if any(not 1 <= stage <= 5 for stage in config.frozen_stages):
            raise ModelError(f"frozen stages are numbered 1 to 5, got {list(config.frozen_stages)}")
        base = config.stem_width
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False)
        self.backbone.bn1 = nn.BatchNorm2d(base)
        channels = base
        for number, stride in ((1, 1), (2, 2), (3, 2)):
            planes = base * 2 ** (number - 1)
            stage = _stage(channels, planes, config.blocks[number - 1], stride, config.stride_in_1x1)
            setattr(self.backbone, f"layer{number}", stage)
            channels = planes * _EXPANSION
        stride, dilation = (1, 2) if config.dilated else (2, 1)
        self.roi_head_feature_extractor = _stage(
            channels, 8 * base, config.blocks[3], stride, config.stride_in_1x1, dilation
        )
        features = 8 * base * _EXPANSION
        self.obj_downsample = nn.Sequential(nn.Dropout(DROPOUT), Linear(_COORDINATES + features, width), nn.ReLU())
        self._freeze()

    def _freeze(self) -> None:
        parts = {
            1: (self.backbone.conv1, self.backbone.bn1),
            **{number + 1: (getattr(self.backbone, f"layer{number}"),) for number in (1, 2, 3)},
            5: (self.roi_head_feature_extractor,),
        }
        frozen = [module for stage in self.config.frozen_stages for module in parts[stage]]
        if self.config.frozen_batch_norm:
            frozen += self._batch_norms()
        for module in frozen:
            for parameter in module.parameters():
                parameter.requires_grad_(False)

    def _batch_norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> "FastRCNN":  # noqa: FBT001, FBT002 (torch's signature)
        """As torch's, but frozen batch norms stay as they are."""
        super().train(mode)
        if self.config.frozen_batch_norm:
            for module in self._batch_norms():
                module.eval()
        return self

    def feature_map(self, image: Tensor) -> Tensor:
        """(B, 3, height, width) -> (B, C, height / 16, width / 16)."""
        backbone = self.backbone
        x = F.max_pool2d(F.relu(backbone.bn1(backbone.conv1(image))), kernel_size=3, stride=2, padding=1)
        return backbone.layer3(backbone.layer2(backbone.layer1(x)))

    def region_features(self, image: Tensor, boxes: Tensor, mask: Tensor) -> Tensor:
        """Features of the valid boxes, (R, C), in the order of ``boxes[mask]``."""
        features = self.feature_map(image)
        batch = mask.nonzero()[:, :1].to(boxes.dtype)
        rois = torch.cat([batch, boxes[mask]], dim=1)
        regions = roi_align(features.float(), rois.float(), (_ROI_SIDE, _ROI_SIDE), 1 / _STRIDE, 1, aligned=False)
        return self.roi_head_feature_extractor(regions.to(features.dtype)).mean(dim=(2, 3))

    def forward(self, image: Tensor, boxes: Tensor, sizes: Tensor, mask: Tensor) -> Tensor:
        """Region vectors.

        Args:
            image: (B, 3, height, width), BGR from 0 to 255 minus means, zero-padded.
            boxes: (B, K, 4) in pixels of the image as given.
            sizes: (B, 2) width and height of each image before padding.
            mask: (B, K), True = a box.

        Returns:
            (B, K, W), 0 at padding.
        """
        features = self.region_features(image, boxes, mask)
        where = coordinate_embedding(boxes[mask], sizes[:, None].expand(-1, boxes.shape[1], -1)[mask]).flatten(-2)
        vectors = self.obj_downsample(torch.cat([where.to(features.dtype), features], dim=-1))
        return vectors.new_zeros(*mask.shape, vectors.shape[-1]).masked_scatter(mask[..., None], vectors)


class _Bottleneck(nn.Module):
    def __init__(
        self, channels: int, planes: int, stride: int, stride_in_1x1: bool, dilation: int, *, shortcut: bool
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(channels, planes, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=second, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * _EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * _EXPANSION)
        self.downsample = None
        if shortcut:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, planes * _EXPANSION, 1, stride=stride, bias=False),
                nn.BatchNorm2d(planes * _EXPANSION),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


def _stage(
    channels: int, planes: int, blocks: int, stride: int, stride_in_1x1: bool, dilation: int = 1
) -> nn.Sequential:
    first = _Bottleneck(channels, planes, stride, stride_in_1x1, dilation, shortcut=True)
    others = (
        _Bottleneck(planes * _EXPANSION, planes, 1, stride_in_1x1, dilation, shortcut=False) for _ in range(blocks - 1)
    )
    return nn.Sequential(first, *others)


def without_aliases(state: Mapping[str, Tensor], prefix: str = "image_feature_extractor.") -> dict[str, Tensor]:
    """A checkpoint's weights with the head under one name; either name may be there."""
    alias, name = prefix + HEAD_ALIAS, prefix + HEAD
    found = {key: value for key, value in state.items() if not key.startswith(alias)}
    renamed = {name + key.removeprefix(alias): value for key, value in state.items() if key.startswith(alias)}
    return {**renamed, **found}


def blocks_of(depth: int) -> Sequence[int]:
    """Blocks of layer1 to layer4 of a ResNet.

    Raises:
        ModelError: a depth that is not offered.
    """
    if depth not in DEPTHS:
        raise ModelError(f"a ResNet of {depth} layers is not offered: choose {', '.join(map(str, DEPTHS))}")
    return DEPTHS[depth]
