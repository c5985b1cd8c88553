"""Captions to the words that caption metrics count, without Java.

Follows the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1, lower-casing, as the COCO caption evaluation uses it:
words keep hyphens, endings such as 's and n't become words, most punctuation is dropped. The odd rules are that
program's; each was seen in its output.
"""

import re

# what the COCO caption evaluation drops; brackets have been lower-cased by then and stay, as -lrb- and so on
_DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
_KEEP_PERIOD = frozenset(
    "adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt "
    "cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri "
    "ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich "
    "minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof profs pte ptes "
    "pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs "
    "treas tue tues univ va vs vt wed wis wisc wm wyo".split()
)
_KEEP_PERIOD_AS_NAMES = frozenset("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash mfg Mfg mtg Mtg".split())  # Wash. D.C.
_KEEP_PERIOD_BEFORE_NUMBERS = frozenset("art ca fig figs no nos op pp prop".split())
_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}
_SPELLINGS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "₠": "$",
    "¤": "$",
    "¢": "cents",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
}
# one character each, of a keyboard or an encoding that was mistaken for another
_MISTAKEN = str.maketrans({"\x91": "‘", "\x92": "’", "\x93": "“", "\x94": "”", "\x96": "–", "\x97": "—", "\x80": "€"})
_LINE_SEPARATORS = re.compile(r"[\n\r\v\f\u2028\u2029]+")
# unknown to the program: control and format characters, private ones, half characters, some currencies, emoji
_UNKNOWN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u20a1-\u20a3\u20a5-\u20ab\u20ad-\u20ff"
    "\ud800-\uf8ff\ufe00-\ufe0f\ufeff\ufff0-\U0010ffff]+"
)

_MARKS_OF_LETTERS = "\u0300-\u036f"
_NO_WORD_CHARACTERS = "_²³¹¼-¾\u2070-\u209f\u2150-\u215f\u2190-\u2bff"  # though Python counts them among them
_ANY = rf"(?:[^\W{_NO_WORD_CHARACTERS}]|[{_MARKS_OF_LETTERS}])"
_LETTER = rf"(?:[^\W\d{_NO_WORD_CHARACTERS}]|[{_MARKS_OF_LETTERS}])"
_ENDING = rf"['’](?i:[smd]|re|ve|ll)(?!{_ANY})"
_OLD = rf"(?:[dDoOlL](?!{_ENDING})['’](?={_ANY}))"  # o'clock, d'or
_DOTTED = rf"{_LETTER}{_ANY}*(?:[.!?]{_LETTER}{_ANY}*)*"
_FIRST_WORD = (  # of a sentence
    "(?:(?:A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Now|"
    "Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|When|While|What|Yet|You)"
    rf"(?!{_ANY})|M[rs]\.|</?[a-zA-Z!?])"
)
_AWAY = r"[^\s\"<>|()]+[^\s\"<>|.!?(){},\-]"  # the end of an address

# The first alternative that matches decides. Groups: "whole" is a word as it stands, "word" one that may be an
# abbreviation, "ending" one whose apostrophe is made straight; "mark" is dropped.
_TOKEN = re.compile(
    rf"""
      (?P<simple>[a-zA-Z]+)(?!\S)
    | (?P<whole>
          (?i:https?)://{_AWAY}
        | (?:www\.(?:[^\s".<>|!?()\{{\}},]+\.)+[a-zA-Z]{{2,4}}
            |(?:[^\s"`'<>|.!?()\{{\}},\-_$@]+\.)+(?:com|net|org|edu))(?!{_ANY})(?:/{_AWAY})?
        | [a-zA-Z0-9][^\s"<>|()]*@(?:[^\s"<>|().]+\.)*[^\s"<>|().]+         # e-mail
        | </?[a-zA-Z!?](?:[^<>=]|="[^"]*")*>                                # tag
        | \([-^x=~<>'][_.]?[-^x=~<>']\) | [-^x=~<>']_[-^x=~<>'](?!{_ANY})   # (^_^)
        | [<>]?[:;=][-o*']?[()DPdpO\\\{{@|\[\]](?![A-Za-z])                  # :-)
        | (?:\(\d{{2,3}}\)[ \xa0]?|\+{{,2}}(?:\d{{2,4}}[- \xa0])?\d{{2,4}}[- \xa0])\d{{3,4}}[- \xa0]?\d{{3,5}}
        | \d{{1,4}}[ \xa0]\d{{1,4}}(?:\\?/|⁄)\d{{1,4}}                       # 7 1/2
        | \d{{1,2}}[-/]\d{{1,2}}[-/]\d{{2,4}}(?!{_ANY})
        | [A-Za-z0-9]+(?:-[A-Za-z]+){{,2}}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){{,2}}){{1,2}}
        | (?:\d{{1,4}}-)?\d{{1,4}}⁄\d{{1,4}}
        | \d{{1,4}}-\d{{1,4}}/\d{{1,4}}
        | {_DOTTED}\.-(?:(?:{_LETTER}\.)+|{_ANY}+)(?:-{_ANY}+)*             # a.m.-5
        | (?:Ed|Ph)\.D\.
        | [A-Za-z0-9][A-Za-z0-9.,]*(?:-[A-Za-z0-9]+)+(?:\.(?=[,;:]))?(?!{_ANY})   # street,half-empty
        | {_LETTER}(?=\.\s+{_FIRST_WORD})                                       # sign J. The dog
        | (?:{_LETTER}\.)+(?:{_LETTER}(?!{_ANY}|\.{_LETTER})|(?!{_LETTER}))   # u.s.
        | [cC]\+\+ | [cCfF]\#
        | [A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+                              # AT&T
        | [A-Z]+\$
        | ['’][nN](?:['’]|(?!{_ANY}))                                       # rock 'n' roll
        | ['’](?i:em|cause|till?)(?!{_ANY})
        | ['’](?:\d\d(?![\w"/'’])|[2-9]0s(?!{_ANY}))                           # '98, the '90s
        | (?i:c'mon|e'er|s'mores|ev'ry|li'l|nat'l|nor'easter|c'est|cont'd\.|(?:ol|somethin|dunkin)')(?!{_ANY})
        | [jJ]'(?={_LETTER}{{2}}) | [yY]'(?={_LETTER}{{2}})
        | [A-HJ-XZn](?!{_ENDING})['’‘]{_LETTER}{{2,}}                        # B'day
        | {_LETTER}+[aeiouyAEIOUY](?!{_ENDING})['’][aeiouA-Z]{_LETTER}*      # ma'am
        | (?:\d{{1,3}}(?:,\d{{3}})+|\d*\.\d+|{_DOTTED})(?:-{_ANY}+)+        # 1,000-piece
        | @{_LETTER}[{_MARKS_OF_LETTERS}\w]* | \#{_LETTER}+
        | \#\#+ | @@+ | _+ | \*\*+ | (?:\\\*)+ | <<|>>
        | &\#\d+; | &[aeiouAEIOU](?:acute|grave|uml);
      )
    | (?P<number>[-+]?(?:\d+(?:[.:,]\d+)+|(?:[.:,]\d+)+)|[-+]\d+)
    | (?P<ending>{_ENDING} | [nN]['’][tT](?!{_ANY}))
    | '(?P<early>[tT])(?P<rest>(?i:is|was))(?!{_ANY})
    | (?P<word>
          {_LETTER}+?(?=[nN]['’][tT])
        | {_OLD}?{_ANY}+(?:[-‐‑_]{_OLD}?{_ANY}+)+
        | {_OLD}{_ANY}+
        | {_DOTTED}
        | {_ANY}+
      )
    | (?P<mark>\.{{3,}}|…|-{{2,}}|[‐-―]|["“”«»‹›`‘’]|''|&(?i:nbsp|quot|mdash);)
    | (?P<loud>[!?]+)
    | (?P<other>(?i:&(?:amp|lt|gt);)|[⁰-⁹²³¹]+|[₀-₉]+|\S)
    """,
    re.VERBOSE,
)


def clean_line(caption: str) -> str:
    """A caption on one line: every kind of line end becomes a space."""
    return _LINE_SEPARATORS.sub(" ", caption)


def caption_words(caption: str) -> list[str]:
    """Words of a caption, lower-cased, in order; empty for one without any.

    A number such as "7 1/2" is one word, with a no-break space in it.
    """
    text = clean_line(caption).translate(_MISTAKEN).replace("\xad", "").replace("&apos;", "'")
    text = _UNKNOWN.sub(" ", text)
    words: list[str] = []
    place = 0
    while match := _TOKEN.search(text, place):
        place = match.end()
        kind, token = match.lastgroup, match[0]
        if kind == "simple":
            word = token.lower()
            words.extend(_SPLIT_WORDS.get(word, (word,)))
        elif kind in ("word", "number"):
            if text[place : place + 1] == "." and _keeps_its_period(token, text[place + 1 : place + 3]):
                token, place = token + ".", place + 1
            word = token.lower()
            words.extend(_SPLIT_WORDS.get(word, (word,)))
        elif kind == "rest":
            words.extend(("'t", match["rest"].lower()))
        elif kind == "ending":
            words.append(token.lower().replace("’", "'"))
        elif kind == "whole":
            words.append(_whole(token))
        elif kind != "mark":
            words.append(_SPELLINGS.get(token.lower(), token.lower()))
    return [word for word in words if word not in _DROPPED]


def _keeps_its_period(word: str, behind: str) -> bool:
    """Whether the period behind a word belongs to it; ``behind`` are the two characters behind the period."""
    if behind[:1] in tuple(",;:"):  # not empty: such a period ends no sentence
        return True
    lower = word.lower()
    if lower in _KEEP_PERIOD_BEFORE_NUMBERS:
        return behind.lstrip()[:1].isdigit()
    return lower in _KEEP_PERIOD or word in _KEEP_PERIOD_AS_NAMES or (word.isupper() and word.title() in _NAMES)


def _whole(token: str) -> str:
    """A token that is kept whole: no spaces, brackets by their names."""
    token = token.lower().replace(" ", "\xa0").replace("&amp;", "&")
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


_NAMES = frozenset(name for name in _KEEP_PERIOD_AS_NAMES if name not in ("Mfg", "Mtg"))
