"""METEOR and SPICE, which are Java programs in the package ``pycocoevalcap``: found, run with a time limit, or not.

Neither is part of plainvl. The programs are started directly, in English, since METEOR fails where numbers are written
with a comma; the package's own starter waits for ever when Java dies.
"""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "pycocoevalcap"
_ENGLISH = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
_METEOR = "meteor/meteor-1.5.jar"
_SPICE = "spice/spice-1.0.jar"
_SPICE_NEEDS = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")


class UnavailableError(Exception):
    """A metric cannot be computed here; says why in one line."""


def why_unavailable(metric: str) -> str:
    """What METEOR or SPICE lacks on this machine; empty if nothing."""
    package = _package_folder()
    if package is None:
        return f"{metric} needs the package {PACKAGE}: pip install {PACKAGE}"
    if shutil.which("java") is None:
        return f"{metric} needs Java: install a Java runtime"
    needed = (_METEOR,) if metric == "METEOR" else (_SPICE, *_SPICE_NEEDS)
    missing = [name for name in needed if not (package / name).is_file()]
    if not missing:
        return ""
    if metric == "SPICE":
        return f"SPICE needs Stanford CoreNLP 3.6.0: put {Path(missing[0]).name} into the folder spice/lib of {PACKAGE}"
    return f"{metric} needs {missing[0]} of {PACKAGE}, which is not there: install the package again"


def meteor(
    captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]], *, time_limit_s: float = 600
) -> tuple[float, list[float]]:
    """METEOR 1.5 over all images (from summed statistics, not the mean), and of each.

    Args:
        captions: words of one caption an image.
        references: words of its reference captions.
        time_limit_s: of each of the two runs of the program.

    Raises:
        UnavailableError: it is not there, ended with an error or took too long.
    """
    command = [
        "java",
        *_ENGLISH,
        "-Xmx2G",
        "-jar",
        str(_need("METEOR") / _METEOR),
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]
    lines = [
        " ||| ".join(["SCORE", *(_plain(other) for other in others), _plain(caption)])
        for caption, others in zip(captions, references, strict=True)
    ]
    statistics = _run("METEOR", command, "\n".join(lines) + "\n", time_limit_s).splitlines()
    values = _run("METEOR", command, " ||| ".join(["EVAL", *statistics]) + "\n", time_limit_s).split()
    try:
        *per_image, total = map(float, values)
    except ValueError:
        raise UnavailableError(f"METEOR gave {' '.join(values)!r:.80} instead of numbers") from None
    if len(per_image) != len(captions):
        raise UnavailableError(f"METEOR gave {len(per_image)} values for {len(captions)} images")
    return total, per_image


def spice(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, time_limit_s: float = 3600
) -> tuple[float, list[float]]:
    """SPICE 1.0: the mean of the images' F-measures of scene-graph tuples, and of each.

    Args:
        captions: one caption an image, as it was written.
        references: its reference captions.
        time_limit_s: of the program.

    Raises:
        UnavailableError: as ``meteor``.
    """
    package = _need("SPICE")
    rows = [
        {"image_id": place, "test": caption, "refs": list(others)}
        for place, (caption, others) in enumerate(zip(captions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.json"), Path(folder, "found.json")
        given.write_text(json.dumps(rows), encoding="utf-8")
        command = [
            "java",
            *_ENGLISH,
            "-Xmx8G",
            "-jar",
            str(package / _SPICE),
            str(given),
            "-out",
            str(found),
            "-silent",
        ]
        _run("SPICE", command, "", time_limit_s)
        try:
            values = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in json.loads(found.read_text())}
            per_image = [values[place] for place in range(len(rows))]
        except (OSError, ValueError, KeyError, TypeError):
            raise UnavailableError("SPICE wrote no result for every image") from None
    return sum(per_image) / len(per_image), per_image


def _package_folder() -> Path | None:
    """Where the package lies; it is not imported, since its import may download files."""
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _need(metric: str) -> Path:
    reason = why_unavailable(metric)
    if reason:
        raise UnavailableError(reason)
    return _package_folder()


def _plain(words: Sequence[str]) -> str:
    return " ".join(" ".join(words).replace("|||", "").split())


def _run(metric: str, command: list[str], given: str, time_limit_s: float) -> str:
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, encoding="utf-8", timeout=time_limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{metric} took longer than {time_limit_s:g} s") from None
    except OSError as error:
        raise UnavailableError(f"{metric}: Java cannot be started ({error.strerror})") from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise UnavailableError(f"{metric} ended with code {done.returncode}: {said:.120}")
    return done.stdout
