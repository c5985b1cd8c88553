"""Train a small sentencepiece model on question files, with the special ids of a published one.

python scripts/train_sentencepiece.py --input questions.json --output beit3.spm
python scripts/train_sentencepiece.py --layout deberta --input questions.json --output model/spm.model     # for VLE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import io
import os
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from data.errors import DataError
from data.files import iterate_jsonl, open_atomic, read_json
from scripts.arguments import OneLineParser
from scripts.program import run

LAYOUTS = {
    # the tokenizer adds XLM-R's own ids outside the model
    "beit3": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
    "deberta": {
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
        **{"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"},
        "byte_fallback": True,
    },
}
NUM_BYTES = 256  # pieces of the fallback, beside those of --vocab_size
MAX_TEXT_BYTES = 65536
MAX_PIECE_CHARACTERS = 16  # sentencepiece's own limit
MAX_SEED_WORDS = 20_000


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="VQA questions or COCO captions (.json), records with a question or captions (.jsonl), or text, a line "
        "each",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("beit3.spm"), help="model file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=300,
        help="at most so many pieces; fewer where the texts have no more (default: 300)",
    )
    parser.add_argument(
        "--layout",
        choices=sorted(LAYOUTS),
        default="beit3",
        help="special ids of beit3.spm, or of DeBERTa's spm.model with 256 pieces for bytes (default: beit3)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another model under the name of --output")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the texts, train, write the model under its final name once it is whole; never over another one unasked."""
    args = build_parser().parse_args(argv)
    _check_output(args.output)
    texts = [text for path in args.input for text in read_texts(path)]
    model = train_model(texts, args.vocab_size, args.layout)

    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    if args.output.exists() and args.output.read_bytes() == model:
        print(f"{args.output}: unchanged, {pieces} pieces from {len(texts)} texts")
        return
    if args.output.exists() and not args.overwrite:  # perhaps the published tokenizer, which nobody could train again
        raise DataError(f"--output {args.output} exists: give --overwrite or another --output")
    with open_atomic(args.output, binary=True) as file:
        file.write(model)
    print(f"{args.output}: {pieces} pieces from {len(texts)} texts")


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise DataError(f"--output {output} is a folder: give the name of a file, such as {output / 'beit3.spm'}")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise DataError(f"--output {output}: {above} is a file, not a folder: give another --output")


def train_model(texts: list[str], vocab_size: int, layout: str = "beit3") -> bytes:
    """A serialised unigram model; the same texts give the same bytes (one thread, nothing shuffled or sampled).

    Raises:
        DataError: for no texts, or a ``vocab_size`` that cannot hold every character.
    """
    import sentencepiece

    if not texts:
        raise DataError("no text to train on in the files of --input: give files with questions or captions")
    if vocab_size < 4:
        raise DataError(f"--vocab_size {vocab_size} is too small: three ids are special, give at least 4 (usual: 300)")
    model = io.BytesIO()
    try:
        with _inside_temporary_folder():  # the model remembers the name of its seed file, so that name must be constant
            Path("seeds.tsv").write_text(_seed_pieces(texts), encoding="utf-8")
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab_size + NUM_BYTES * ("byte_fallback" in LAYOUTS[layout]),
                hard_vocab_limit=False,
                character_coverage=1.0,
                num_threads=1,
                shuffle_input_sentence=False,
                max_sentence_length=MAX_TEXT_BYTES,
                seed_sentencepieces_file="seeds.tsv",
                minloglevel=2,
                **LAYOUTS[layout],
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].split("] ")[-1]  # without the place in the C++ source
        what = f"--vocab_size {vocab_size} on {len(texts)} texts"
        raise DataError(f"sentencepiece cannot train with {what}: {reason}") from None
    return model.getvalue()


@contextmanager
def _inside_temporary_folder() -> Iterator[None]:
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def _seed_pieces(texts: list[str]) -> str:
    """Candidates for pieces, one ``piece<tab>frequency`` a line: every word of the texts and every part of it.

    Sentencepiece would propose only parts that several different words share. In a vocabulary of forty words hardly any
    whole word is one, and questions come out as letters, twice as long as need be.
    """
    words = Counter(word for text in texts for word in unicodedata.normalize("NFKC", text).split())
    pieces: Counter[str] = Counter()
    for word, count in words.most_common(MAX_SEED_WORDS):
        marked = "\u2581" + word  # the mark of a word's start
        for start in range(len(marked)):
            for end in range(start + 2, min(len(marked), start + MAX_PIECE_CHARACTERS) + 1):
                pieces[marked[start:end]] += count * (end - start)
    return "".join(f"{piece}\t{score}\n" for piece, score in pieces.most_common())


def read_texts(path: Path) -> Iterator[str]:
    """The questions or captions of one file, in file order, without empty ones.

    Raises:
        DataError: for a missing or malformed file; the message has the file and, where there is one, the line.
    """
    if path.suffix == ".json":
        texts = _texts_of_json(path)
    elif path.suffix == ".jsonl":
        texts = [text for number, record in iterate_jsonl(path) for text in _texts_of(record, f"{path}:{number}")]
    else:
        texts = _lines_of(path)
    for text in texts:
        line = " ".join(text.split())
        if len(line.encode("utf-8")) > MAX_TEXT_BYTES:
            raise DataError(
                f"{path} has a text of {len(line)} characters: split it, at most {MAX_TEXT_BYTES} bytes a text"
            )
        if line:
            yield line


def _texts_of_json(path: Path) -> list[str]:
    content = read_json(path)
    if isinstance(content, dict) and content.get("images"):
        from data.caption_references import read_caption_references

        return [text for captions in read_caption_references(path).captions.values() for text in captions]
    records = content.get("questions") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise DataError(
            f'{path} has no questions: expected {{"questions": [{{"question": text, ...}}]}} or a list of such, or a '
            "file of captions"
        )
    texts = [record.get("question") if isinstance(record, dict) else None for record in records]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f'{path}: record {row} has no "question" (a text): add it or delete the record')
    return texts


def _texts_of(record: dict, where: str) -> list[str]:
    captions = record.get("captions", [])
    texts = [record["question"]] if "question" in record else []
    texts += captions if isinstance(captions, list) else [captions]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{where}: neither "question" (a text) nor "captions" (a list of texts): add one')
    return texts


def _lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}): --input takes .json, .jsonl or text files") from None


if __name__ == "__main__":
    run(main)
