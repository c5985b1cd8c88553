"""Llama's parts that have a backward pass of their own."""

import pytest
import torch
from torch.nn import functional as F

from models.llava.llama import RMSNorm, _Gated


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_the_norm_has_autograds_values_and_gradients_and_keeps_no_copy_in_float32(dtype, tolerance):
    torch.manual_seed(0)
    x, grad = (torch.randn(2, 5, 64) * 3).to(dtype), torch.randn(2, 5, 64).to(dtype)
    norm = RMSNorm(64, 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()

    def plain(x):
        wide = x.float()
        return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    found = []
    for run in (norm, plain):
        leaf, kept = x.clone().requires_grad_(), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda v, kept=kept: kept.setdefault(id(v), v), lambda v: v):
            out = run(leaf)
        wide = sum(v.numel() for v in kept.values() if v.dtype == torch.float32) // x.numel()
        found.append((out, *torch.autograd.grad(out, [leaf, norm.weight], grad), wide))
    (ours, *our_grads, our_wide), (theirs, *their_grads, their_wide) = found
    assert torch.equal(ours, theirs)
    for one, other in zip(our_grads, their_grads, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()
    if dtype == torch.bfloat16:
        assert our_wide == 0 < their_wide
