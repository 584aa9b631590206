"""What the whole data room raises."""


class BadDataError(ValueError):
    """Training data that cannot be used; the message names the file, what is wrong with it, and the key to change."""
