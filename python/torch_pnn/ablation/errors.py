"""What the ablation tool tells a person when it can't go on, and the check for optional packages.

Every failure that a user can cause or cure is one of these exceptions with one clear sentence; the command line prints
that sentence without a traceback. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType


class AblationError(Exception):
    """Something outside the program went wrong: a folder, a file, a missing package. Exit status 1."""

    exit_status = 1


class UsageError(AblationError):
    """The command itself can't be carried out as given: an unknown study, a bad number. Exit status 2."""

    exit_status = 2


class RecordsError(AblationError):
    """Rows or claims can't be written into the study's folder: no fault of the run that wanted to."""


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: the name to import, such as ``"sklearn"``.
        package: the name that pip knows it by, such as ``"scikit-learn"``.
        purpose: what it is needed for; it ends the sentence "... is needed for".

    Returns:
        The imported module.

    Raises:
        AblationError: it is not installed; the sentence holds the pip command.

    Example:
        >>> require("json", "json", "nothing").__name__
        'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        broken = "" if missing.split(".")[0] == module.split(".")[0] else f" ({error})"
        raise AblationError(
            f"{package} is needed for {purpose} and can't be imported{broken}: pip install {package}"
        ) from error


def describe_os_error(error: OSError) -> str:
    """The operating system's own words for an error, without the path and the number.

    Example:
        >>> import errno
        >>> describe_os_error(OSError(errno.ENOSPC, "No space left on device"))
        'no space left on device'
    """
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]
