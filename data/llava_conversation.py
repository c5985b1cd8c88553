"""Conversations as prompts, and which of their tokens are learned (LLaVA's ``conversation.py`` and ``train.py``).

A turn is (who, text) with "human" or "gpt", as in LLaVA's data files; one format object per template replaces the
original's global one. Labels are built from the tokens themselves: each token that begins inside an answer is learned.
The original counts tokens of re-encoded parts instead, and masks a whole sample where the counts disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.collate import pad_tokens
from data.errors import DataError
from data.tokenizers.llama import IMAGE_TOKEN, IMAGE_TOKEN_ID, LlamaTokenizer, num_bytes

IGNORE_INDEX = -100
HUMAN, GPT = "human", "gpt"
EOS = "</s>"

Turn = tuple[str, str | None]


@dataclass(frozen=True)
class TurnFormat:
    """How one side's turns are written: ``lead``, and around a text that is not empty ``before`` and ``after``."""

    lead: str = ""
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Template:
    """How a conversation is written.

    Attributes:
        opening: before everything.
        first_question: the format of the first turn.
        question: the format of the human's later turns.
        answer: the format of gpt's turns; None: the template has prompts of questions only.
        caption_only: learn the answer behind a bare image, whatever the question (the template of pre-training).
    """

    opening: str = ""
    first_question: TurnFormat = TurnFormat()
    question: TurnFormat = TurnFormat()
    answer: TurnFormat | None = None
    caption_only: bool = False


def _vicuna(person: str) -> Template:
    system = (
        f"A chat between a curious {person} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    )
    question = TurnFormat("USER:", " ", " ")
    return Template(
        opening=system + " ",
        first_question=question,
        question=question,
        answer=TurnFormat("ASSISTANT:", " ", EOS),
    )


_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_CAPTION = TurnFormat(after="\n")

TEMPLATES: dict[str, Template] = {
    "v1": _vicuna("user"),
    "vicuna_v1": _vicuna("user"),
    "llava_v1": _vicuna("human"),
    "plain": Template(first_question=_CAPTION, question=_CAPTION, caption_only=True),
    "llava_llama_2": Template(
        first_question=TurnFormat(before=f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n", after=" [/INST]"),
        question=TurnFormat(before="<s>[INST] ", after=" [/INST]"),
        answer=TurnFormat(before=" ", after=f" {EOS}"),
    ),
}


@dataclass(frozen=True)
class Encoded:
    """A conversation as the model sees it; -200 marks an image.

    Attributes:
        ids: token ids.
        labels: as long; -100 where nothing is learned.
    """

    ids: list[int]
    labels: list[int]


def build_prompt(turns: Sequence[Turn], template: Template) -> str:
    """The text of a conversation; a last turn ("gpt", None) leaves it open for the model's answer.

    Raises:
        DataError: if the template has no place for answers and one is given.
    """
    return template.opening + "".join(text for text, _ in _written_turns(turns, template))


def move_image_token(text: str) -> str:
    """Put <image> and a new line in front of a turn that has <image> anywhere; several become one."""
    if IMAGE_TOKEN not in text:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: LlamaTokenizer,
    template: Template,
    *,
    has_image: bool,
    max_length: int,
    where: str = "conversation",
) -> Encoded:
    """Ids of a conversation, and labels for its answers, each with the end token behind it.

    A first turn that is not the human's is dropped. Without an image the ids are cut to ``max_length``; with one only
    ``collate`` cuts, as in the original.

    Args:
        turns: human and gpt in turn.
        tokenizer: of the base model.
        template: one of ``TEMPLATES``.
        has_image: each turn's <image> is moved to its front and becomes an image; else <image> is plain text.
        max_length: most tokens of a sample.
        where: names the sample in messages.

    Raises:
        DataError: if the turns are not human and gpt in turn, the template wants others, or no label is left.
    """
    turns = _checked_turns(turns, where)
    if has_image:
        turns = [(role, move_image_token(text)) for role, text in turns]
    if template.caption_only:
        if len(turns) != 2 or IMAGE_TOKEN not in turns[0][1] or not has_image:
            raise DataError(
                f"{where}: the plain template needs one question with {IMAGE_TOKEN} and one answer, got {len(turns)} "
                f"turns {'with' if has_image else 'without'} an image: choose another template or mend the sample"
            )
        written = [(IMAGE_TOKEN, False), (turns[1][1] + _CAPTION.after, True)]
    else:
        written = [(template.opening, False), *_written_turns(turns, template)]
    prompt = "".join(text for text, _ in written)
    try:
        ids, places = tokenizer.locate(prompt, images=has_image)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not has_image:
        ids, places = ids[:max_length], places[:max_length]
    labels = _labels(ids, places, written)
    if not any(role == GPT for role, _ in turns):
        raise DataError(
            f"{where}: no turn of {GPT!r} follows one of {HUMAN!r}, so nothing can be learned: put the question before "
            "its answer"
        )
    if all(label == IGNORE_INDEX for label in labels[:max_length]):
        raise DataError(
            f"{where}: no token of an answer within the first {max_length} of {len(ids)} tokens, so nothing can be "
            "learned: give answers that are not empty, a shorter conversation, or a larger maximal length"
        )
    return Encoded(ids, labels)


def collate(samples: Sequence[Encoded], pad_id: int, max_length: int) -> dict[str, Tensor]:
    """Join samples, padded on the right to the longest and cut to ``max_length``.

    Returns:
        ``ids`` (B, T) int64; ``labels`` (B, T) int64, -100 where nothing is learned; ``mask`` (B, T) bool, True = a
        token. It comes from the lengths: the original takes every ``pad_id`` for padding, a literal <unk> too.
    """
    ids, padding = pad_tokens([sample.ids[:max_length] for sample in samples], pad_id)
    labels, _ = pad_tokens([sample.labels[:max_length] for sample in samples], IGNORE_INDEX)
    mask = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding == 0
    return {"ids": ids, "labels": labels, "mask": mask}


def _checked_turns(turns: Sequence[Turn], where: str) -> list[tuple[str, str]]:
    for number, (role, text) in enumerate(turns, start=1):
        if role not in (HUMAN, GPT):
            raise DataError(
                f"{where}: turn {number} is from {role!r:.40}, must be {HUMAN!r} or {GPT!r}: mend the sample"
            )
        if not isinstance(text, str):
            raise DataError(f"{where}: turn {number} has no text but {text!r:.40}: mend the sample")
    dropped = 1 if turns and turns[0][0] != HUMAN else 0
    kept = list(turns[dropped:])
    if not kept:
        raise DataError(f"{where}: no turn of {HUMAN!r}: mend or remove the sample")
    for index, (role, _) in enumerate(kept):
        expected = GPT if index % 2 else HUMAN
        if role != expected:
            raise DataError(
                f"{where}: turn {index + dropped + 1} is from {role!r}, must be from {expected!r}, because the two "
                "take turns: mend the sample"
            )
    return kept


def _written_turns(turns: Sequence[Turn], template: Template) -> list[tuple[str, bool]]:
    """Texts that make up the prompt after its opening, and whether each is learned."""
    written: list[tuple[str, bool]] = []
    for index, (role, text) in enumerate(turns):
        if role == HUMAN:
            form = template.question if index else template.first_question
        elif template.answer is not None:
            form = template.answer
        elif text:
            raise DataError("this template has no place for answers in a prompt: leave the last one open, or take v1")
        else:
            continue
        written.append((form.lead, False))
        if text:
            # the space before an answer is part of its first word's token
            written.append((form.before + text + form.after, role == GPT))
    return written


def _labels(ids: list[int], places: list[int], written: list[tuple[str, bool]]) -> list[int]:
    labels = [IGNORE_INDEX] * len(ids)
    begin = index = 0
    for text, learned in written:
        end = begin + num_bytes(text)
        while index < len(ids) and places[index] < end:
            # a token that begins before the answer is the question's; an image in an answer cannot be predicted
            if learned and places[index] >= begin and ids[index] != IMAGE_TOKEN_ID:
                labels[index] = ids[index]
            index += 1
        begin = end
    return labels
