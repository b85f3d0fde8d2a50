"""What is raised for a mistake of the user. Imports nothing, so that every part of the package can raise it."""


class UserError(Exception):
    """A mistake in what the user gave us: one line naming the key or file:line, the value and the remedy; exit code 2."""

    code = 2


class SpoiltError(UserError):
    """Training has made numbers that nothing can be computed with: one line with the last good checkpoint and the remedy; exit code 1."""

    code = 1
