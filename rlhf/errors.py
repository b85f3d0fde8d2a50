"""The errors that end a run with one line for the user. Imports nothing of the package, so all modules can use it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS, ESTALE
from signal import SIGINT, Signals

# errno of errors of storage; a failed write to an open file raises such an OSError without a file name
STORAGE = (EACCES, EDQUOT, EFBIG, EIO, ENOSPC, EPERM, EROFS, ESTALE)

LONGEST = 1000  # characters of a message, because names in user input may have any length


class UserError(Exception):
    """A mistake in the user's input; exit code 2. The message is one line: key or file:line, value, and remedy."""

    code = 2

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class MissingError(UserError):
    """A tokenizer does not exist. A dry run can do without it."""


class SpoiltError(UserError):
    """Training has made values that are not finite; exit code 1. The message has the last checkpoint and a remedy."""

    code = 1


class StorageError(UserError):
    """Storage has failed during a run; exit code 1. The message has the path."""

    code = 1


class RewardError(UserError):
    """Too many rewards have failed; exit code 1. The message has the first error."""

    code = 1


class JudgingError(UserError):
    """A judge has not answered all requests; exit code 1. The message has an error of the judge."""

    code = 1


class LostError(UserError):
    """Another rank has ended or does not respond; exit code 1."""

    code = 1


def said(line: str, code: int) -> None:
    """Print the last line of a program to standard error. code: its exit code, which is not used."""
    print(line, file=sys.stderr)


def told(name: str, call: Callable[[], int], tell: Callable[[str, int], None] = said) -> int:
    """Return the exit code of call().

    If call() raises an error that is not a fault of this program, print one line that starts with `name`, and return
    the exit code of the error. tell: prints the line; its arguments are the line and the exit code.
    """
    try:
        return call()
    except UserError as error:
        text, code = str(error), error.code
    except OSError as error:
        if not (text := failure(error)):
            raise
        code = UserError.code
    except ModuleNotFoundError as error:  # --dry-run and RLHF_PYTHON may use a Python without the packages
        remedy = "run ./launch.sh install cpu (or gpu), and unset RLHF_PYTHON"
        text, code = f"the package {error.name} is not installed in {sys.prefix}: {remedy}", UserError.code
    except KeyboardInterrupt as error:  # its argument is the signal, if it is not SIGINT
        number = Signals(*(error.args or [SIGINT]))
        text, code = f"ended by {number.name}; nothing more was saved", 128 + number
    tell(f"{name}: {text}", code)
    return code


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Add a path to an OSError that has none, such as that of a write to an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def failure(error: OSError, where: object = "") -> str:
    """Return "path: reason" for an error of a file; "" for other errors.

    where: the path to use if the error has none and is an error of storage.
    """
    path = error.filename or (where if error.errno in STORAGE else "")
    if isinstance(path, bytes):
        path = path.decode(errors="replace")
    return f"{path}: {error.strerror}" if path and not isinstance(error, ConnectionError) else ""
