"""Files that a run of VL-BERT needs: whether they are there, asked before anything starts (no torch).

The launchers ask this in one process, so that nobody waits for torchrun and other machines to hear of a missing file.
"""

import argparse
from pathlib import Path
from typing import Any

from data.box_features import open_regions
from data.errors import DataError
from data.files import read_json
from data.tokenizers.wordpiece import WordPieceTokenizer
from data.vlbert_files import MISSING_DATA, OWN, place_of, question_files, region_path
from engine.errors import EngineError

VOCABULARY, ANSWERS, CONFIG = "vocab.txt", "answers_vqa.txt", "config.yaml"  # also beside the weights of a checkpoint
BERT_HINT = "NETWORK.BERT_MODEL_NAME is its folder"
PRETRAINED_HINT = "--partial-pretrain or NETWORK.PARTIAL_PRETRAIN"
NO_ANSWERS = "no answer list: give DATASET.ANSWER_VOCAB_FILE, or --build_answers 9"


def find_training_files(args: argparse.Namespace) -> None:
    """Questions, words, answers, weights and regions of a training run.

    Raises:
        DataError: one is not there.
        EngineError: weights are not there.
    """
    settings = args.config["DATASET"]
    asked = args.train_file or settings["TRAIN_IMAGE_SET"].split("+")
    if not args.no_validation:
        asked = [*asked, *([args.val_file] if args.val_file else settings["VAL_IMAGE_SET"].split("+"))]
    if args.do_test:
        asked = [*asked, *settings["TEST_IMAGE_SET"].split("+")]
    _find_questions(args, asked)
    _find_words(args, None)
    # a run that goes on has its weights in its checkpoint
    resumes = args.resume or (args.auto_resume and any(args.run_dir.glob("checkpoint-*/manifest.json")))
    if not args.from_scratch and (args.dry_run or not resumes):
        _find_weights(args)
    _find_regions(args, asked)


def find_prediction_files(args: argparse.Namespace) -> None:
    """Checkpoint, questions, words, answers and regions of a prediction.

    Raises:
        DataError: one is not there.
    """
    if not Path(args.finetune).exists():
        raise DataError(f"no checkpoint at {args.finetune}: give one as --ckpt, or train with this config first")
    asked = [args.eval_split] if _is_own(args.eval_split) else args.eval_split.split("+")
    _find_questions(args, asked)
    if args.annotations:
        _need(Path(args.annotations), "give the file as --annotations")
    _find_words(args, Path(args.finetune) if Path(args.finetune).is_dir() else None)
    _find_regions(args, asked)


def vocabulary_file(config: dict[str, Any], checkpoint: Path | None = None) -> Path:
    """Of a checkpoint folder, else of the BERT folder."""
    if checkpoint is not None and (checkpoint / VOCABULARY).is_file():
        return checkpoint / VOCABULARY
    return Path(config["NETWORK"]["BERT_MODEL_NAME"]) / VOCABULARY


def pretrained_file(args: argparse.Namespace) -> str:
    """VL-BERT's weights to begin from; empty for none."""
    return args.config["NETWORK"]["PARTIAL_PRETRAIN"] if args.partial_pretrain is None else args.partial_pretrain


def bert_file(network: dict[str, Any]) -> Path:
    """BERT's weights, by the settings of ``NETWORK``."""
    if network["BERT_PRETRAINED"]:
        return Path(f"{network['BERT_PRETRAINED']}-{network['BERT_PRETRAINED_EPOCH']:04d}.model")
    return Path(network["BERT_MODEL_NAME"]) / "pytorch_model.bin"


def resnet_file(network: dict[str, Any]) -> Path:
    """Weights of the ResNet of the image path.

    Raises:
        EngineError: the settings name none.
    """
    if not network["IMAGE_PRETRAINED"]:
        raise EngineError(
            "the image path begins with a trained ResNet, nothing is downloaded: give the ResNet's weights as "
            "NETWORK.IMAGE_PRETRAINED, or --from_scratch"
        )
    return Path(f"{network['IMAGE_PRETRAINED']}-{network['IMAGE_PRETRAINED_EPOCH']:04d}.model")


def require_weights(path: str | Path, hint: str) -> None:
    """There is a file or folder of weights.

    Raises:
        EngineError: there is none; ``hint`` says which setting names it.
    """
    if not Path(path).exists():
        raise EngineError(f"no weights at {path} ({hint}): fetch them, or start from random weights by --from_scratch")


def _is_own(asked: str) -> bool:
    return asked.endswith(".jsonl")


def _need(path: Path, advice: str) -> None:
    if not path.is_file():
        read_json(path, advice=advice)  # fails as it would later


def _find_questions(args: argparse.Namespace, asked: list[str]) -> None:
    for name in asked:
        if _is_own_file(args, name):
            _need(Path(name), "give a .jsonl file of your questions")
            continue
        for path in question_files(args.config["DATASET"]["DATASET"], name, args.data_path):
            _need(path, MISSING_DATA)


def _is_own_file(args: argparse.Namespace, name: str) -> bool:
    named = [*(getattr(args, "train_file", None) or ()), getattr(args, "val_file", None)]
    return name in named or _is_own(name)


def _find_words(args: argparse.Namespace, checkpoint: Path | None) -> None:
    vocabulary = vocabulary_file(args.config, checkpoint)
    if not vocabulary.is_file():
        WordPieceTokenizer.load(vocabulary)  # fails as it would later
    brought = checkpoint is not None and (checkpoint / ANSWERS).is_file()
    if brought or getattr(args, "build_answers", None):
        return
    answers = args.config["DATASET"]["ANSWER_VOCAB_FILE"]
    if not answers:
        raise DataError(NO_ANSWERS)
    if not Path(answers).is_file():
        raise DataError(f"no answer list at {answers}: give DATASET.ANSWER_VOCAB_FILE")


def _find_weights(args: argparse.Namespace) -> None:
    network = args.config["NETWORK"]
    if not network["IMAGE_FEAT_PRECOMPUTED"]:
        require_weights(resnet_file(network), "NETWORK.IMAGE_PRETRAINED is the beginning of its name")
    if pretrained := pretrained_file(args):
        require_weights(pretrained, PRETRAINED_HINT)
    else:
        require_weights(bert_file(network), BERT_HINT)


def _find_regions(args: argparse.Namespace, asked: list[str]) -> None:
    settings = args.config["DATASET"]
    for place in sorted({OWN if _is_own_file(args, name) else place_of(name) for name in asked}):
        path = region_path(
            place,
            args.data_path,
            boxes=settings["BOXES"],
            dataset=settings["DATASET"],
            zipped=settings["ZIP_MODE"],
            given=args.regions,
        )
        if path.suffix != ".zip" or not path.is_file():  # the list of an archive takes long to read
            open_regions(path)
