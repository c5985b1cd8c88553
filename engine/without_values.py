"""Tensors that have shapes but no values and take no memory, to count what a step would take.

Import it where it is wanted only: making the mode loads torch's compiler, a second or two.
"""

import copy

from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

SHAPES_ONLY = FakeTensorMode(allow_non_fake_inputs=True)  # tensors made under it have no values


def copy_without_values(model: nn.Module) -> nn.Module:
    """The model with tensors that have shapes but no values, which take no memory."""
    with FakeCopyMode(SHAPES_ONLY):
        return copy.deepcopy(model)
