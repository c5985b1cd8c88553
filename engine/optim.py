"""Parameter groups (weight decay or not, learning-rate scale by name) and the optimizer."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.errors import EngineError


@dataclass(frozen=True)
class LRRule:
    """How a parameter's name decides its learning rate: ``layer`` numbers the name, ``scales[layer]`` multiplies."""

    layer: Callable[[str], int]
    scales: tuple[float, ...]


def layer_decay_rule(layer_id: Callable[[str], int], num_layers: int, decay: float) -> LRRule:
    """Rates that shrink by ``decay`` per layer from the head down (layer 0 is the embeddings, the head L + 1)."""
    if not 0 < decay <= 1:
        raise EngineError(f"--layer_decay must be in (0, 1], got {decay}")
    return LRRule(layer_id, tuple(decay ** (num_layers + 1 - index) for index in range(num_layers + 2)))


def head_multiplier_rule(prefix: str, multiplier: float) -> LRRule:
    """A rate multiplied for the parameters whose name starts with ``prefix``, unchanged for the others."""
    return LRRule(lambda name: int(name.startswith(prefix)), (1.0, float(multiplier)))


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    no_decay: Collection[str] = (),
    rule: LRRule | None = None,
) -> list[dict[str, Any]]:
    """Optimizer groups in order of first appearance (BEiT-3 ``optim_factory.get_parameter_groups``).

    Tensors of at most one dimension, names ending in ``.bias`` and the names in ``no_decay`` take no weight decay.
    Frozen parameters are left out.

    Args:
        named_parameters: as ``model.named_parameters()`` gives them.
        weight_decay: decay of the groups that decay.
        no_decay: further names without decay.
        rule: learning-rate scale by name; without one every scale is 1.

    Returns:
        Groups with ``name`` (``layer_<n>_decay``, or plain ``decay``/``no_decay`` without a rule), ``params``,
        ``param_names``, ``weight_decay`` and ``lr_scale``.

    Raises:
        EngineError: if nothing is trainable.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        decays = not (parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay)
        label = "decay" if decays else "no_decay"
        scale = 1.0
        if rule is not None:
            layer = rule.layer(name)
            label, scale = f"layer_{layer}_{label}", rule.scales[layer]
        group = groups.setdefault(
            label,
            {
                "name": label,
                "params": [],
                "param_names": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    if not groups:
        raise EngineError("no parameter is trainable: everything is frozen")
    return list(groups.values())


def groups_by_part(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    scales: Mapping[str, float],
    *,
    part: Callable[[str], str],
    decays: Callable[[str], bool],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Optimizer groups in the order of ``scales``, each part with and without weight decay; empty ones are left out.

    Args:
        named_parameters: as ``model.named_parameters()`` gives them; frozen ones are left out.
        scales: part → learning-rate scale.
        part: of a parameter's name.
        decays: whether the parameter of that name takes weight decay.
        weight_decay: of the groups that decay.

    Returns:
        As ``parameter_groups``, named ``<part>_decay`` and ``<part>_no_decay``.

    Raises:
        EngineError: if nothing is trainable.
    """
    groups = {
        (name, decay): {
            "name": f"{name}_{'decay' if decay else 'no_decay'}",
            "params": [],
            "param_names": [],
            "weight_decay": weight_decay if decay else 0.0,
            "lr_scale": scale,
        }
        for name, scale in scales.items()
        for decay in (True, False)
    }
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            group = groups[part(name), decays(name)]
            group["params"].append(parameter)
            group["param_names"].append(name)
    found = [group for group in groups.values() if group["params"]]
    if not found:
        raise EngineError("no parameter is trainable: everything is frozen")
    return found


def describe_groups(groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """Groups as plain values for printing: name, number of tensors and parameters, decay, peak rate."""
    return [
        {
            "name": group["name"],
            "tensors": len(group["params"]),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
            "weight_decay": group["weight_decay"],
            "peak_lr": lr * group["lr_scale"],
        }
        for group in groups
    ]


def build_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """Fused AdamW with decoupled decay (Loshchilov and Hutter, 2019) over the given groups.

    The group's own ``lr`` is set before each step by the backend: base rate times ``lr_scale``.
    """
    if lr < 0:
        raise EngineError(f"the learning rate must not be negative, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise EngineError(f"--opt_betas must be two numbers in [0, 1), got {betas}")
    if eps <= 0:
        raise EngineError(f"--opt_eps must be positive, got {eps}")
    return torch.optim.AdamW(_plain(groups), lr=lr, betas=betas, eps=eps, fused=True)


class TransformersAdamW(torch.optim.Optimizer):
    """The AdamW that transformers had until 4.49, bias correction on.

    Against torch's, epsilon is added before the bias correction, and the weights decay after the step.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        """Groups may bring their own ``lr`` and ``weight_decay``."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Take one step."""
        if closure is not None:
            raise EngineError("this optimizer takes no closure")
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            beta1, beta2 = group["betas"]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
            states = [self.state[parameter] for parameter in parameters]
            for state in states:
                state["step"] += 1
            first, second = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            grads = [parameter.grad for parameter in parameters]
            torch._foreach_mul_(first, beta1)
            torch._foreach_add_(first, grads, alpha=1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            denominators = torch._foreach_sqrt(second)
            torch._foreach_add_(denominators, group["eps"])
            steps = [float(state["step"]) for state in states]
            sizes = [-group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step) for step in steps]
            torch._foreach_addcdiv_(parameters, first, denominators, sizes)
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])


def build_optimizer(
    kind: str, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """An optimizer by name over the given groups.

    Args:
        kind: ``adamw`` (torch's), ``transformers_adamw``, ``adam`` (decay added to the gradient) or ``sgd`` (momentum
            0.9).
        groups: as ``parameter_groups`` gives them.
        lr: peak rate; the backend sets each group's before each step.
        betas: of the Adams.
        eps: of the Adams.

    Raises:
        EngineError: unknown name.
    """
    if kind == "adamw":
        return build_adamw(groups, lr=lr, betas=betas, eps=eps)
    if kind == "transformers_adamw":
        return TransformersAdamW(_plain(groups), lr=lr, betas=betas, eps=eps)
    if kind == "adam":
        return torch.optim.Adam(_plain(groups), lr=lr, betas=betas, eps=eps)
    if kind == "sgd":
        return torch.optim.SGD(_plain(groups), lr=lr, momentum=0.9)
    raise EngineError(f"unknown optimizer {kind!r}: choose adamw, transformers_adamw, adam or sgd")


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without ``param_names``, a key of which torch wants every group to have it and prints a warning."""
    return [{key: value for key, value in group.items() if key != "param_names"} for group in groups]
