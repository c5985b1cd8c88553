"""LLaVA's own way to label a conversation, for comparisons: it counts tokens of re-encoded parts.

Where the counts do not add up it masks the whole sample, with a warning that its users took for a bug in their data.
"""

from collections.abc import Sequence

from data.llava_conversation import (
    EOS,
    IGNORE_INDEX,
    TEMPLATES,
    Encoded,
    Template,
    Turn,
    build_prompt,
    move_image_token,
)
from data.tokenizers.llama import IMAGE_TOKEN, LlamaTokenizer

# where it parts a round into question and answer
_SEPARATORS = {
    TEMPLATES["v1"]: " ASSISTANT: ",
    TEMPLATES["llava_v1"]: " ASSISTANT: ",
    TEMPLATES["llava_llama_2"]: "[/INST] ",
}


def encode_as_the_original(
    turns: Sequence[Turn], tokenizer: LlamaTokenizer, template: Template, *, has_image: bool, max_length: int
) -> Encoded:
    """Ids as ``encode_conversation`` has them, and the original's labels, perhaps none; turns that it takes."""
    turns = [(role, move_image_token(text) if has_image else text) for role, text in turns]
    if turns[0][0] != "human":
        turns = turns[1:]
    prompt = f"{IMAGE_TOKEN}{turns[1][1]}\n" if template.caption_only else build_prompt(turns, template)
    ids, _ = tokenizer.locate(prompt, images=has_image)
    if not has_image:
        ids = ids[:max_length]
    return Encoded(ids, _labels(ids, prompt, tokenizer, template, has_image, max_length))


def _labels(
    ids: list[int], prompt: str, tokenizer: LlamaTokenizer, template: Template, has_image: bool, max_length: int
) -> list[int]:
    encode = tokenizer.encode_with_images if has_image else tokenizer.encode
    labels = list(ids)
    if template.caption_only:
        masked = len(encode(IMAGE_TOKEN))
        labels[:masked] = [IGNORE_INDEX] * masked
        return labels
    separator, is_vicuna = _SEPARATORS[template], template != TEMPLATES["llava_llama_2"]
    done = 1  # <s>
    labels[:done] = [IGNORE_INDEX]
    for index, round_text in enumerate(prompt.split(EOS)):
        parts = round_text.split(separator)
        if not round_text or len(parts) != 2:
            break
        # a lone round's <s> stands for the </s> of the real sequence; the question alone also has a last lone mark
        surplus = 1 if index and is_vicuna and not tokenizer.legacy else 0
        num_question = len(encode(parts[0] + separator)) - 2 - surplus
        for place in range(done, min(done + num_question, len(labels))):
            labels[place] = IGNORE_INDEX
        done += len(encode(round_text)) - surplus
    labels[done:] = [IGNORE_INDEX] * len(labels[done:])
    if done < max_length and done != sum(token != tokenizer.pad_id for token in ids):
        return [IGNORE_INDEX] * len(ids)
    return labels
