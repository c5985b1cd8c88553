"""Captioning with BEiT-3: its data, loss, validation and prediction files, wired for the run script."""

import argparse
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.beit3_captions import BEiT3CaptionDataset, CaptionCollate, CaptionImageDataset, collate_images
from data.caption_index import (
    SPLIT_FILES,
    TRAINING_INDEX,
    CaptionRecord,
    folder_records,
    own_evaluation_records,
    own_training_records,
    read_caption_index,
)
from data.errors import DataError
from data.files import write_jsonl_atomic
from data.loader import EvalLoader, TrainLoader
from data.own_captions import read_caption_file
from data.tokenizers.spm import XLMRTokenizer
from data.transforms import normalize
from data.vqa_index import check_tokenizer_stamp
from engine import distributed
from engine.errors import RunError
from engine.evaluation import forward_batches, gather_by_id, sum_over_processes
from engine.log import peak_mib, say
from models.beit3.decoding import DecodingSettings, Generated, SpecialTokens, generate
from models.beit3.tasks import captioning_loss
from scripts import loaders
from scripts.beit3_loaders import image_reader
from scripts.caption_scores import find_references, load_references, write_and_score
from scripts.evaluation_files import clear_temporaries, open_partial_results

BEST_METRIC = "CIDEr"
_SEED_STEP = 1_000_003  # a prime: samples of neighbouring ids and seeds draw apart


def load_labels(args: argparse.Namespace) -> None:
    """Captions have no answer list."""


def read_split(args: argparse.Namespace, split: str, tokenizer: XLMRTokenizer) -> list[CaptionRecord]:
    """Records of ``train``, of a split to caption, of a ``.jsonl`` file of one's own or of a folder of images."""
    files = SPLIT_FILES[args.task]
    if split == "train" and args.train_file:
        records = [
            record
            for path in args.train_file
            for record in own_training_records(read_caption_file(path), tokenizer, str(path))
        ]
    elif split == "train":
        check_tokenizer_stamp(Path(args.data_path), TRAINING_INDEX, tokenizer.fingerprint)
        records = read_caption_index(Path(args.data_path) / files[split], vocab_size=tokenizer.vocab_size)
    elif split == "val" and args.val_file:
        records = own_evaluation_records(read_caption_file(args.val_file))
    elif split in files:
        records = read_caption_index(Path(args.data_path) / files[split], vocab_size=None)
    elif split.endswith(".jsonl"):
        records = own_evaluation_records(read_caption_file(split))
    elif Path(split).is_dir():
        records = folder_records(split)
        if not Path(split).samefile(args.data_path):
            raise DataError(
                f"--eval_split {split} is a folder of images: leave --data_path out, or give the same folder"
            )
    else:
        raise DataError(f"--eval_split {split}: choose val, test, a .jsonl file of your own, or a folder of images")
    return loaders.usable_records(args, records)


def train_loader(
    args: argparse.Namespace,
    records: list[CaptionRecord],
    tokenizer: XLMRTokenizer,
    *,
    image_size: int,
    device: torch.device,
) -> TrainLoader:
    """Captions in random order, with random crops and masks."""
    images = image_reader(args, image_size, train=True)
    dataset = BEiT3CaptionDataset(
        records, images, tokenizer, mask_prob=args.captioning_mask_prob, max_tokens=args.num_max_bpe_tokens
    )
    # compiled layers see the text length as a dynamic size; rounding keeps the number of distinct ones small
    collate = CaptionCollate(tokenizer.pad_id, multiple_of=8 if args.compile else 1)
    return loaders.build_loader(args, dataset, collate, train=True, device=device)


def eval_loader(
    args: argparse.Namespace,
    records: list[CaptionRecord],
    *,
    image_size: int,
    device: torch.device,
    done: Collection[int] = (),
) -> EvalLoader:
    """Every image once, without the batches whose records (their places) are all in ``done``."""
    dataset = CaptionImageDataset(records, image_reader(args, image_size, train=False))
    return loaders.build_loader(args, dataset, collate_images, train=False, device=device, done=done)


def train_and_val_loaders(
    args: argparse.Namespace, tokenizer: XLMRTokenizer, labels: None, *, image_size: int, device: torch.device
) -> tuple[TrainLoader, EvalLoader | None]:
    """Loaders of a training run; no validation where there is nothing to compare captions with."""
    records = read_split(args, "train", tokenizer)
    say(f"train: {len(records)} captions of {len({record.image_id for record in records})} images")
    loader = train_loader(args, records, tokenizer, image_size=image_size, device=device)
    if args.train_file and not args.val_file:
        return loader, None
    reference_file, reason = find_references(args, "val")
    if reference_file is None:
        say(f"warning: no validation, and so no checkpoint-best: {reason}")
        return loader, None
    records = read_split(args, "val", tokenizer)
    say(f"val: {len(records)} images, compared with the captions of {reference_file}")
    return loader, eval_loader(args, records, image_size=image_size, device=device)


def training_loss(args: argparse.Namespace) -> Callable[[nn.Module, dict[str, Any], int], dict[str, Any]]:
    """What the loop calls at every micro-batch."""
    return partial(
        loss_fn,
        label_smoothing=args.label_smoothing,
        drop_worst_ratio=args.drop_worst_ratio,
        drop_worst_after=args.drop_worst_after,
    )


def loss_fn(
    model: nn.Module,
    batch: dict[str, Any],
    step: int,
    *,
    label_smoothing: float,
    drop_worst_ratio: float,
    drop_worst_after: int,
) -> dict[str, Any]:
    """Mean smoothed divergence at the masked positions; from step ``drop_worst_after`` + 1 on without the worst.

    ``acc`` is the share of masked positions whose most probable word is the right one.
    """
    logits = model(normalize(batch["image"]), batch["masked_tokens"], batch["padding_mask"], batch["masked_positions"])
    loss = captioning_loss(
        logits,
        batch["targets"],
        label_smoothing=label_smoothing,
        drop_worst_ratio=drop_worst_ratio if step > drop_worst_after else 0.0,
    )
    correct = (logits.detach().argmax(dim=-1) == batch["targets"]).float().mean()
    return {"loss": loss, "acc": correct, "images_replaced": batch["images_replaced"]}


def validation(
    args: argparse.Namespace,
    tokenizer: XLMRTokenizer,
    labels: None,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> Callable[[nn.Module, EvalLoader, int], dict[str, float]]:
    """What the loop calls after every epoch: captions of all images, written to a file and scored."""
    records = read_split(args, "val", tokenizer)
    references = load_references(args, "val", [record.image_id for record in records])

    def validate(model: nn.Module, loader: EvalLoader, epoch: int) -> dict[str, float]:
        captions: dict[int, dict[str, Any]] = {}
        predict(args, model, loader, tokenizer, lambda rows, _: captions.update(rows), device=device, autocast=autocast)
        captions = gather_by_id(captions, expected=loader.num_samples)
        found = {index: row["caption"] for index, row in captions.items()}
        return write_and_score(args, f"{args.task}_val_e{epoch}", found, references)

    return validate


def predict(
    args: argparse.Namespace,
    model: nn.Module,
    loader: EvalLoader,
    tokenizer: XLMRTokenizer,
    add: Callable[[dict[int, dict[str, Any]], bool], None],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """Caption this process's images.

    ``add`` gets image id → {"caption", "score"} of each batch, and whether all its images could be read.

    Raises:
        RunError: a score is not a finite number.
    """
    settings = DecodingSettings(
        method=args.decoding,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        max_tokens=args.num_max_bpe_tokens,
        top_p=args.top_p,
        temperature=args.temperature,
    )
    replaced = 0
    batches = forward_batches(
        model,
        loader,
        partial(
            _generate,
            settings=settings,
            tokens=special_tokens(tokenizer),
            seed=args.seed,
            # weights that are divided over the processes are gathered by all of them at every step
            agree_done=partial(_all_are_done, device) if args.zero_stage == 3 and not args.eval else bool,
        ),
        device=device,
        autocast=autocast,
        total=len(loader),
        description="captioning",
    )
    for batch, generated in batches:
        rows = zip(batch["image_id"], generated.ids.tolist(), generated.scores.tolist(), strict=True)
        captions = {}
        for image_id, ids, score in rows:
            if not math.isfinite(score):
                raise RunError(
                    f"image {image_id}: the score of its caption is not a finite number; the weights may be damaged, "
                    "or the precision too low: try --amp no"
                )
            captions[image_id] = {"caption": tokenizer.decode(ids), "score": score}
        replaced += batch["images_replaced"]
        add(captions, not batch["images_replaced"])
    loaders.warn_of_replaced(sum_over_processes({"replaced": float(replaced)})["replaced"])


def special_tokens(tokenizer: XLMRTokenizer) -> SpecialTokens:
    """The ids that the decoder has to know."""
    return SpecialTokens(bos=tokenizer.bos_id, pad=tokenizer.pad_id, eos=tokenizer.eos_id, mask=tokenizer.mask_id)


def _all_are_done(device: torch.device, done: bool) -> bool:
    """Whether this is true on every process."""
    return bool(distributed.all_reduce_(torch.tensor(int(not done), device=device)) == 0)


def _generate(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    settings: DecodingSettings,
    tokens: SpecialTokens,
    seed: int,
    agree_done: Callable[[bool], bool],
) -> Generated:
    image: Tensor = normalize(batch["image"])
    seeds = torch.tensor([(seed * _SEED_STEP + index) % 2**63 for index in batch["image_id"]], device=image.device)
    return generate(model, image, tokens, settings, seeds=seeds, agree_done=agree_done)


def run_evaluation(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: XLMRTokenizer,
    labels: None,
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """``--eval``: write the server's prediction file, the captions beside their images, and scores where possible.

    An evaluation that was stopped goes on: what was captioned is kept in hidden files of the output folder until the
    results are written. A dry run captions two batches and writes nothing.
    """
    records = read_split(args, args.eval_split, tokenizer)
    references = load_references(args, args.eval_split, [record.image_id for record in records])
    if args.dry_run:
        records = records[: 2 * args.eval_batch_size * distributed.world_size()]
    say(f"{args.eval_split}: {len(records)} images")
    name = f"{args.task}_{Path(args.eval_split).stem}"
    image_size = model.config.image_size
    kept = open_partial_results(
        args,
        name,
        [record.image_id for record in records],
        records=records,
        answers=(),
        tokenizer=tokenizer.fingerprint,
        image_size=image_size,
        device=device,
    )
    done = [place for place, record in enumerate(records) if record.image_id in kept.found]
    loader = eval_loader(args, records, image_size=image_size, device=device, done=done)
    predict(
        args,
        model,
        loader,
        tokenizer,
        lambda rows, whole: kept.add(rows, keep=whole),
        device=device,
        autocast=autocast,
    )
    predictions = kept.gather()
    if args.dry_run:
        say(f"dry run: {len(predictions)} images captioned, nothing written; peak memory {peak_mib(device):.0f} MiB")
        return
    if distributed.is_main():
        _write_captions(args, name, records, predictions)
    write_and_score(args, name, {index: row["caption"] for index, row in predictions.items()}, references)
    kept.remove()


def _write_captions(
    args: argparse.Namespace, name: str, records: list[CaptionRecord], predictions: dict[int, dict[str, Any]]
) -> None:
    """``captions_<name>.jsonl``: each image with its caption and score, in the order of the records."""
    path = Path(args.output_dir) / f"captions_{name}.jsonl"
    clear_temporaries(path)
    rows = (
        {
            "image": record.image_path,
            "image_id": record.image_id,
            "caption": predictions[record.image_id]["caption"],
            "score": round(predictions[record.image_id]["score"], 6),
        }
        for record in records
    )
    write_jsonl_atomic(path, rows)
