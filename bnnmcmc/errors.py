"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file, column, row or field, what was found, what was expected and
    what to do. The command line prints it without a stack trace and exits with status 2.
    """
