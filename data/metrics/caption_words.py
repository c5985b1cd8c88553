"""Captions to the words that caption metrics count, without Java.

Follows the Penn Treebank tokenizer of Stanford CoreNLP, lower-casing, as the COCO caption evaluation uses it: words
keep hyphens, endings such as 's and n't become words, most punctuation is dropped.
"""

import re

# what the COCO caption evaluation drops; brackets have been lower-cased by then and stay, as -lrb- and so on
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_ABBREVIATIONS = frozenset(
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat sun mr mrs ms dr prof st jr "
    "sr rev gen col capt lt maj sgt sen rep gov hon inc corp ltd co bros mt ft ave blvd rd ln dept etc vs no esq vol "
    "pp fig al cf est".split()
)
_SPLIT_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "wanna": "wan na",
    "gotta": "got ta",
    "lemme": "lem me",
    "gimme": "gim me",
    "y'all": "y' all",
}
_ENDINGS = ("'s", "'m", "'d", "'re", "'ve", "'ll")
_WITH_APOSTROPHE = re.compile(r"o'clock|ma'am|[odl]'\w|n't$")  # these stay one word
_OTHER_CHARACTERS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¢": "cents",
}
_SPELLINGS = {
    "’": "'",
    "‘": "'",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
}
_LAST_CHARACTER = "\uffff"  # what stands behind it, such as emoji, is dropped
_LINE_SEPARATORS = re.compile(r"[\n\r\v\f\u2028\u2029]+")

# the first alternative that matches decides
_TOKEN = re.compile(
    r"""
      (?P<plain>
          (?:https?://|www\.)\S*[^\s.,;:!?'\-)]         # address, without the punctuation behind it
        | [\w.+-]+@[\w-]+(?:\.[\w-]+)+                  # e-mail
        | </?[a-z!?][^<>\s]*>                           # tag
        | [@\#][a-z]\w+
        | '\d\ds?(?!["\w])                              # '90s
        | '(?:em|cause|till?|n'?)(?!\w)
        | '(?:s|m|d|re|ve|ll)(?!\w)
        | \d{1,2}:\d\d(?![\d_]|:\d)
        | \d+/\d+(?:/\d+)?(?!\w)
        | \d{1,3}(?:,\d{3})+(?:-\w+)+
        | (?:(?<!\w)[+-])?(?:\d+(?:[,:.\-/]\d+)*|\.\d+)(?![.\-/]?\w)
        | (?:[a-z]\.){2,}[a-z]?(?!\w)                   # u.s.
      )
    | '(?P<early>t)(?P<rest>is|was)(?!\w)
    | (?P<word>\w+(?:(?:[.\-/](?=\w)|(?-i:(?<=[A-Z])&(?=[A-Z]))|'(?=[^\W\d_]))\w+)*)
    | (?P<marks>\.{3,}|…|-{2,}|[–—]|["“”«»‹›`]|'')
    | (?P<loud>[!?]+)
    | (?P<other>\S)
    """,
    re.VERBOSE | re.IGNORECASE,
)


def clean_line(caption: str) -> str:
    """A caption on one line: every kind of line end becomes a space."""
    return _LINE_SEPARATORS.sub(" ", caption)


def caption_words(caption: str) -> list[str]:
    """Words of a caption, lower-cased, in order; empty for one without any."""
    text = clean_line(caption)
    for spelling, plain in _SPELLINGS.items():
        text = text.replace(spelling, plain)
    words: list[str] = []
    place, end = 0, len(text.rstrip())
    while match := _TOKEN.search(text, place):
        place = match.end()
        kind, token = match.lastgroup, match[0]
        if kind == "word":
            if text[place : place + 1] == "." and _keeps_its_period(token, is_last=place + 1 >= end):
                token, place = token + ".", place + 1
            words.extend(_parts(token.lower()))
        elif kind == "rest":
            words.extend(("'t", match["rest"].lower()))
        elif kind == "other":
            if token <= _LAST_CHARACTER:
                words.append(_OTHER_CHARACTERS.get(token, token))
        elif kind != "marks":  # these are dropped in any case
            words.append(token.lower())
    return [word for word in words if word not in _DROPPED]


def _keeps_its_period(word: str, *, is_last: bool) -> bool:
    """Whether the period behind a word belongs to it: an abbreviation, or an initial inside the caption."""
    if word.lower() in _ABBREVIATIONS:
        return True
    return len(word) == 1 and word.isalpha() and not is_last


def _parts(word: str) -> list[str]:
    """Split off 's, n't and so on; an apostrophe elsewhere stands alone, and is dropped later."""
    if word in _SPLIT_WORDS:
        return _SPLIT_WORDS[word].split()
    endings: list[str] = []
    while ending := next((e for e in _ENDINGS if word.endswith(e) and len(word) > len(e)), None):
        word = word.removesuffix(ending)
        endings.insert(0, ending)
    if word.endswith("n't") and len(word) > 3:
        word = word.removesuffix("n't")
        endings.insert(0, "n't")
    if _WITH_APOSTROPHE.match(word):
        return [word, *endings]
    return [part for part in re.split("(')", word) if part] + endings
