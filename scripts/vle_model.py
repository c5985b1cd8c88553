"""VLE from a model folder: sizes, weights, tokenizer, image settings; shared by training, evaluation and ask.py."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.clip_images import CONFIG_FILE as IMAGE_FILE
from data.clip_images import CLIPImageSettings
from data.errors import DataError
from data.files import read_json
from data.tokenizers.deberta import MODEL_FILE, DebertaTokenizer, tokenizer_files
from data.vle_rows import LABEL_FILE
from data.vqa_answers import AnswerVocabulary
from engine.errors import EngineError
from engine.log import say
from engine.weights import read_state_dict
from models.vle.config import VLEConfig
from models.vle.loading import load_rule, prepare_vle_state_dict
from models.vle.vle import VLEForVQA
from scripts.pretrained import load_pretrained

CONFIG_FILE = "config.json"
WEIGHTS_KEY = "model|module|state_dict"
_HEAD_ROWS = "vqa_classifier.3.weight"


@dataclass(frozen=True)
class VLEFolder:
    """What a model folder says of itself.

    Attributes:
        values: content of its ``config.json``.
        config: the same, checked.
        tokenizer: of ``spm.model``.
        images: how images are prepared.
    """

    values: dict[str, Any]
    config: VLEConfig
    tokenizer: DebertaTokenizer
    images: CLIPImageSettings

    @property
    def answers(self) -> AnswerVocabulary | None:
        """Answers of the folder's ``id2label``."""
        return None if self.config.labels is None else AnswerVocabulary(self.config.labels, source="id2label")


def read_model_folder(
    folder: str | Path, *, image_size: int | None = None, sentencepiece_model: str | Path | None = None
) -> VLEFolder:
    """Read everything but the weights.

    Args:
        folder: a published folder, or a checkpoint of a run.
        image_size: another image side than the folder's.
        sentencepiece_model: another file than the folder's.

    Raises:
        DataError: a file is missing or broken, or the tokenizer has more ids than the model words.
        ModelError: a size or option of ``config.json`` does not work.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    values = read_json(path, advice="give the folder of a VLE model as --model_dir")
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold one JSON object")
    config = VLEConfig.from_dict(values, str(path))
    image_file = folder / IMAGE_FILE
    images = CLIPImageSettings.load(image_file) if image_file.is_file() else CLIPImageSettings()
    side = image_size or config.vision.image_size
    if side < config.vision.patch_size:
        raise DataError(f"image_size {side} is smaller than a patch of {config.vision.patch_size} pixels: raise it")
    config = replace(config, vision=replace(config.vision, image_size=side))
    if images.crop_size != (side, side):
        images = images.resized(side)
    tokenizer = DebertaTokenizer(sentencepiece_model or folder / MODEL_FILE)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise DataError(
            f"{sentencepiece_model or folder / MODEL_FILE} has {tokenizer.vocab_size} ids but the model "
            f"{config.text.vocab_size} words: give the spm.model of this model"
        )
    return VLEFolder(values, config, tokenizer, images)


def build_model(
    folder: VLEFolder, weights: str | Path | None, answers: AnswerVocabulary, *, for_training: bool
) -> VLEForVQA:
    """The network with its weights; says what keeps random start values.

    Args:
        folder: of the model.
        weights: file or folder; None for random weights, or those that a resume will bring.
        answers: of the run, which decide the size of the output layer.
        for_training: a new head is fine; in an evaluation nothing may be missing.

    Raises:
        DataError: an evaluation with other answers than the weights were trained on.
        EngineError: the weights cannot be read.
        ModelError: weights that do not fit.
    """
    config = replace(folder.config, labels=tuple(answers.answers))
    model = VLEForVQA(config)
    if weights is None:
        return model
    try:
        state = read_state_dict(weights, model_key=WEIGHTS_KEY)
    except EngineError as error:
        raise EngineError(f"{error}" + ("; or start from random weights by --from_scratch" * for_training)) from None
    state = prepare_vle_state_dict(state, config)
    rows = state[_HEAD_ROWS].shape[0] if _HEAD_ROWS in state else None
    same = rows == len(answers) and folder.config.labels in (None, config.labels)
    if rows is not None and not same:
        difference = f"{weights} was trained on another answer list ({rows} answers there, {len(answers)} here)"
        if not for_training:
            raise DataError(f"{difference}: evaluate with the id2label of its own config.json")
        say(f"warning: {difference}: the output layer starts anew")
        state = {name: value for name, value in state.items() if not name.startswith("vqa_classifier.3.")}
    load_pretrained(model, state, load_rule(for_training=for_training), weights)
    return model


def folder_files(folder: VLEFolder, answers: AnswerVocabulary) -> dict[str, bytes]:
    """Name → content of the files beside the weights, with this run's answers and image size, as the original reads
    them.
    """
    values = folder.values | {
        "id2label": {str(label): answer for label, answer in enumerate(answers.answers)},
        "label2id": {answer: label for label, answer in enumerate(answers.answers)},
        "architectures": ["VLEForVQA"],
        "vision_config": dict(folder.values["vision_config"]),
    }
    vision = values["vision_config"]
    (vision["vision_config"] if "vision_config" in vision else vision)["image_size"] = folder.config.vision.image_size
    return {
        CONFIG_FILE: (json.dumps(values, indent=2, sort_keys=True) + "\n").encode(),
        IMAGE_FILE: folder.images.to_json(),
        MODEL_FILE: folder.tokenizer.model.processor.serialized_model_proto(),
        LABEL_FILE: (json.dumps(list(answers.answers)) + "\n").encode(),
        **tokenizer_files(folder.tokenizer),
    }
