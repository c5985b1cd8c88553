"""BlockDrop beside the standard model at inference, and SpotTune beside it in training, in one run.

    python benchmarks/bench_adaptive.py --threads 2

Inference: the base model with the policy network in front of it, whose decisions are then forced to ``--blocks`` of the
layers, others for each sample; against the standard model on the same input. Outputs are checked first against those of
the arithmetic that computes every layer and multiplies.

Training: forward, backward, AdamW, with the policy. ``plain`` is the recipe that computes both branches of everything
and mixes them, as the published code does; decisions that are off by 1e-6 make our code take that way. Gradients are
checked first. Memory is what autograd keeps for the backward pass, in tensors that are not weights.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.flags import add_shared_flags
from benchmarks.measure import in_turns
from benchmarks.rows import Result, Row, load_average, write_result
from models.adaptive import sample_policy
from models.losses import vqa_loss
from models.vlbert.vlbert import EncoderConfig, VLBertConfig
from models.vlbert.vqa import FEATURE_SIZE, VLBertForVQA

VOCABULARY = 8192  # rows that are not looked up would only cost memory
NUM_ANSWERS, POLICY_LAYERS, POLICY_INNER = 3129, 2, 512
MAX_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 1e-4, 1e-2
NUDGE = 1e-6  # beside 0 and 1: no decision any more, so both branches are computed and mixed


def build(args: argparse.Namespace, strategy: str, num_outputs: int = NUM_ANSWERS, **sizes: int) -> VLBertForVQA:
    """A model with random weights and visual input."""
    width = args.width
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width} | sizes
    encoder = EncoderConfig(strategy=strategy, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    scale = {"visual_scale_text_init": 1.0, "visual_scale_object_init": 1.0}
    config = VLBertConfig(encoder=encoder, vocab_size=VOCABULARY, visual_size=width, **scale)
    model = VLBertForVQA(config, num_outputs)
    model.image_feature_extractor.obj_downsample[0].p = 0.0
    return model.to(args.device)


def policy_network(args: argparse.Namespace, model: VLBertForVQA) -> VLBertForVQA:
    """The small model that decides for another one."""
    decisions = model.config.encoder.num_decisions
    return build(args, "standard", 2 * decisions, num_hidden_layers=POLICY_LAYERS, intermediate_size=POLICY_INNER)


def batch_of(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes with features, image sizes, questions."""
    corners = torch.rand(args.batch_size, args.regions, 4) * 300
    corners[..., 2:] += corners[..., :2]
    boxes = torch.cat([corners, torch.rand(args.batch_size, args.regions, FEATURE_SIZE)], dim=-1)
    sizes = torch.full((args.batch_size, 2), 600.0)
    question = torch.randint(1000, VOCABULARY, (args.batch_size, args.words))
    return boxes.to(args.device), sizes.to(args.device), question.to(args.device)


def measure_inference(args: argparse.Namespace) -> dict[str, float]:
    """Standard, and BlockDrop with its policy network, in turns."""
    torch.manual_seed(0)
    model, batch = build(args, "BlockDrop").eval(), batch_of(args)
    standard, decider = build(args, "standard").eval(), policy_network(args, model).eval()
    standard.load_state_dict(model.state_dict())
    num_layers = model.config.encoder.num_hidden_layers
    order = torch.rand(args.batch_size, num_layers).argsort(dim=1)
    policy = (order < args.blocks).float().to(args.device)
    slow = model(*batch, policy).detach()  # with gradients every layer runs

    def adaptive() -> Tensor:
        with torch.no_grad():
            decider(*batch)
            return model(*batch, policy)

    def plain() -> Tensor:
        with torch.no_grad():
            return standard(*batch)

    difference = (adaptive() - slow).abs().max().item()
    if not difference <= MAX_DIFFERENCE:
        raise SystemExit(f"error: outputs differ by {difference:.1e}")
    times = in_turns({"adaptive": adaptive, "standard": plain}, args.rounds, args.device)
    return {"difference": difference, **times, "share": times["adaptive"] / times["standard"]}


def measure_training(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """A step of the standard model, and of each strategy with its policy network in both ways, in turns."""
    torch.manual_seed(0)
    batch, targets = batch_of(args), torch.rand(args.batch_size, NUM_ANSWERS).to(args.device)
    standard = build(args, "standard").train()
    sides = {"standard": _stepper([standard], lambda: standard(*batch), targets)}
    kept = {"standard": _kept_mib(lambda: standard(*batch))}
    for strategy in args.strategies:
        model = build(args, strategy).train()
        decider = policy_network(args, model).train()
        _check_gradients(model, batch, targets)

        def forward(nudge: float, model: VLBertForVQA = model, decider: VLBertForVQA = decider) -> Tensor:
            decisions = sample_policy(decider(*batch))
            return model(*batch, decisions * (1 - 2 * nudge) + nudge if nudge else decisions)

        for name, nudge in ((strategy, 0.0), (f"{strategy}, plain", NUDGE)):
            sides[name] = _stepper([model, decider], lambda nudge=nudge, forward=forward: forward(nudge), targets)
            kept[name] = _kept_mib(lambda nudge=nudge, forward=forward: forward(nudge))
    times = in_turns(sides, args.rounds, args.device, settled=True)
    return {name: {"seconds": times[name], "kept_mib": kept[name]} for name in sides}


def _check_gradients(model: VLBertForVQA, batch: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> None:
    """The chosen branch alone gives the gradients of both branches and a product, up to the nudge."""
    with torch.no_grad():  # between equal branches a choice makes no difference
        for name, parameter in model.named_parameters():
            if "parallel_" in name:
                parameter += torch.randn_like(parameter) * 0.01
    chosen = torch.rand(len(targets), model.config.encoder.num_decisions, device=targets.device).round()
    chosen[0] = 1  # the block that is compared is trained, however small the batch
    found = []
    for nudge in (0.0, NUDGE):
        policy = (chosen * (1 - 2 * nudge) + nudge).requires_grad_()
        model.eval().zero_grad()  # no dropout
        vqa_loss(model(*batch, policy), targets).backward()
        first = model.vlbert.encoder.layer[0].output.dense.weight.grad.clone()
        found.append((policy.grad, first))
    for one, other in zip(*found, strict=True):
        difference = ((one - other).abs().max() / other.abs().max()).item()
        if not difference <= MAX_GRADIENT_DIFFERENCE:
            raise SystemExit(f"error: gradients differ by {difference:.1e}")
    model.train().zero_grad()


def _stepper(models: list[torch.nn.Module], forward: Callable[[], Tensor], targets: Tensor) -> Callable[[], None]:
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        vqa_loss(forward(), targets).backward()
        optimizer.step()

    return step


def _kept_mib(forward: Callable[[], Tensor]) -> float:
    """What one forward pass leaves for the backward pass, each storage once, without weights."""
    storages: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if not value.is_leaf or not value.requires_grad:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = forward()
    frozen_and_views = {p.untyped_storage().data_ptr() for p in _parameters_in(out)}
    return sum(size for place, size in storages.items() if place not in frozen_and_views) / 2**20


def _parameters_in(out: Tensor) -> list[Tensor]:
    """Leaves of a graph that are trained; their transposed views are saved under the same storage."""
    seen, waiting, leaves = set(), [out.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--regions", type=int, default=37)
    parser.add_argument("--words", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4, help="layers that each sample keeps, of twelve")
    parser.add_argument("--width", type=int, default=768, help="of the network, a multiple of 64")
    parser.add_argument("--strategies", nargs="+", default=["SpotTune", "SpotTune_Block", "BlockDrop"])
    parser.add_argument("--no_training", action="store_true", help="inference only")
    add_shared_flags(parser, rounds=5)
    return parser


def main(argv: list[str] | None = None) -> Result:
    """Measure and print."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    load, setting = load_average(), f"width {args.width}, batch {args.batch_size}, {args.regions} regions, float32"
    found = measure_inference(args)
    details: dict[str, object] = {"inference": found}
    print(
        f"{setting}, {args.device}\n"
        f"  inference: standard {found['standard']:.4g} s, BlockDrop with {args.blocks} of 12 blocks and its policy "
        f"{found['adaptive']:.4g} s, {found['share']:.2f} of it; outputs within {found['difference']:.1e}"
    )
    what, check = f"BlockDrop, {args.blocks} of 12 blocks: inference", f"outputs within {found['difference']:.1e}"
    rows = [Row("steps", what, setting, found["adaptive"], "Standard", found["standard"], check)]
    if not args.no_training:
        training = details["training"] = measure_training(args)
        base = training["standard"]
        for name, found in training.items():
            seconds, kept = found["seconds"], found["kept_mib"]
            slower, more = seconds / base["seconds"], kept / base["kept_mib"]
            print(f"  training step, {name}: {seconds:.3g} s ({slower:.2f} times), {kept:.0f} MiB ({more:.2f} times)")
        rows += training_rows(args, training, setting)
    print(f"  load average {load:.1f} before, {load_average():.1f} after")
    return write_result(args.json, Result(rows, details=details), vars(args))


def training_rows(args: argparse.Namespace, training: dict[str, dict[str, float]], setting: str) -> list[Row]:
    """Each strategy beside the recipe that computes both branches, and beside Standard."""
    rows = []
    for strategy in args.strategies:
        ours, base = training[strategy], training["standard"]
        peers = (("plain two branches", training[f"{strategy}, plain"]), ("Standard", base))
        for name, peer in peers:
            row = Row(
                "steps", f"{strategy}: train step, beside {name}", setting, ours["seconds"], name, peer["seconds"]
            )
            row.check = "same gradients" if peer is not base else "another network: the price of the method"
            row.ours_mib, row.peer_mib = ours["kept_mib"], peer["kept_mib"]
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
