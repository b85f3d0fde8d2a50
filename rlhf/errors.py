"""What is raised for a mistake of the user. Imports nothing, so that every part of the package can raise it."""


class UserError(Exception):
    """A mistake in what the user gave us: one line naming the key or file:line, the value and the remedy; exit code 2."""
