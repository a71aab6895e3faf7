"""The error that a person can mend: the command line prints it as one line and exits with 2."""

from __future__ import annotations

import errno

#: Of the process or the system: no handles or memory are left, whatever lies in the file.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class InputError(ValueError):
    """Data, a folder or an argument does not fit; the message says what, and what would."""


def exhausted(error: BaseException) -> bool:
    """Whether a file could not be opened or mapped for want of handles or memory.

    Such an error says nothing of the file: it is raised as it is, never told as damage.
    """
    return isinstance(error, OSError) and error.errno in _EXHAUSTED
