"""The baseline of the VizWiz course competition: a ResNet-18 and a one-hot question, joined by a small classifier.

Source: ``main.py`` of the competition. Key names and the order of the layers are the original's, so its ``model.pth``
loads strictly and a seed draws the same start weights. Unlike torchvision's ResNet-18, all convolutions have biases.

Letters: B batch, H height and W width of the image, Q entries of a question vector, A answers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import ModelError
from models.linear import Linear

FEATURES = 512  # of the image, of the question, and of the classifier's hidden layer
_STEM_WIDTH = 64
_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels and stride of layer1 to layer4, two blocks each


class BaselineVQA(nn.Module):
    """Image and question vector to answer scores."""

    def __init__(self, num_words: int, num_answers: int) -> None:
        """Build with torch's start weights.

        Args:
            num_words: entries Q of a question vector: the known words and one for all others.
            num_answers: entries A of the answer dictionary.

        Raises:
            ModelError: a size below one.
        """
        super().__init__()
        for name, size in (("num_words", num_words), ("num_answers", num_answers)):
            if size < 1:
                raise ModelError(f"{name} of the baseline must be at least 1, got {size}: give the dictionary's size")
        self.resnet = ResNet18()
        self.text_encoder = Linear(num_words, FEATURES)
        self.fc = nn.Sequential(Linear(2 * FEATURES, FEATURES), nn.ReLU(), Linear(FEATURES, num_answers))

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        """Score every answer.

        Args:
            image: (B, 3, H, W) in [0, 1], not normalised; 224 x 224 in the competition.
            question: (B, Q), 1 at each word of the question, else 0.

        Returns:
            (B, A) logits.

        Raises:
            ModelError: shapes other than these.
        """
        expected = (len(image), self.text_encoder.in_features)
        if question.shape != expected:
            raise ModelError(
                f"the baseline takes question vectors of shape {expected}, got {tuple(question.shape)}: "
                f"build them with the dictionary that the model was trained with, one per image"
            )
        return self.fc(torch.cat([self.resnet(image), self.text_encoder(question)], dim=1))


class ResNet18(nn.Module):
    """The image half: 8 basic blocks in four stages, mean over the places, a linear layer."""

    def __init__(self) -> None:
        """Build with torch's start weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, _STEM_WIDTH, kernel_size=7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(_STEM_WIDTH)
        in_channels = _STEM_WIDTH
        for number, (channels, stride) in enumerate(_STAGES, start=1):
            blocks = nn.Sequential(BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1))
            self.add_module(f"layer{number}", blocks)
            in_channels = channels
        self.fc = Linear(in_channels, FEATURES)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 512).

        Raises:
            ModelError: not a batch of images of three channels.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ModelError(
                f"the baseline takes images of shape (batch, 3, height, width), got {tuple(image.shape)}: "
                f"convert them to RGB and stack them"
            )
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), kernel_size=3, stride=2, padding=1)  # (B, 64, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 512, H/32, W/32)
        return self.fc(x.mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and the input added to what comes out."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """``stride`` of the first convolution."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()  # the input as it is, unless its shape changes
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))
