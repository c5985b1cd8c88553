"""Llama's parts that have a backward pass of their own."""

import pytest
import torch
from torch.nn import functional as F

from models.llava.llama import _Gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_unit_has_torchs_values_and_gradients_and_keeps_its_inputs_only(dtype):
    torch.manual_seed(0)
    gate, up, grad = torch.randn(3, 4, 5, 6, dtype=dtype).unbind()
    found = []
    for run in (_Gated.apply, lambda gate, up: F.silu(gate) * up):
        inputs, kept = [part.clone().requires_grad_() for part in (gate, up)], set()
        with torch.autograd.graph.saved_tensors_hooks(lambda v, kept=kept: kept.add(v.data_ptr()) or v, lambda v: v):
            out = run(*inputs)
        found.append((out, *torch.autograd.grad(out, inputs, grad), len(kept)))
    ours, plain = found
    assert all(torch.equal(one, other) for one, other in zip(ours[:3], plain[:3], strict=True))
    assert (ours[3], plain[3]) == (2, 3)
