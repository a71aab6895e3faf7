"""The error that a person can mend: the command line prints it as one line and exits with 2."""


class InputError(ValueError):
    """Data, a folder or an argument does not fit; the message says what, and what would."""
