"""What is raised for a mistake of the user. Imports nothing, so that every part of the package can raise it."""

LONGEST = 1000  # characters of a message: what users give may have names of any length


class UserError(Exception):
    """A mistake in what the user gave us: one line naming the key or file:line, the value and the remedy; exit code 2."""

    code = 2

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class SpoiltError(UserError):
    """Training has made numbers that nothing can be computed with: one line with the last good checkpoint and the remedy; exit code 1."""

    code = 1
