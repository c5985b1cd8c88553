"""Where the official files of a data set may lie below a data folder."""

from pathlib import Path

from data.errors import DataError

IMAGE_PLACES = ("", "images")  # below the data folder


class AbsentError(DataError):
    """An official file or folder is not there; for an optional split this only means to leave it out."""


def annotation_folders(data_path: Path, annotation_path: str | Path | None, places: tuple[str, ...]) -> list[Path]:
    """Folders to look through: the one that was given, else the usual ``places`` below the data folder."""
    return [Path(annotation_path)] if annotation_path else [data_path / place for place in places]


def find_annotation(name: str, data_path: Path, annotation_path: str | Path | None, places: tuple[str, ...]) -> Path:
    """Where an official annotation file lies.

    Raises:
        AbsentError: it is in none of the folders; they are named.
    """
    folders = annotation_folders(data_path, annotation_path, places)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(map(str, folders))
    raise AbsentError(f"no {name} in {looked}: give the folder of the annotation files as --annotation_path")
