"""The errors of data files: programs print their one line and end with exit code 2."""


class DataError(ValueError):
    """A file, line, image or data setting is unusable; the message has the value, where it stands and the way out."""
