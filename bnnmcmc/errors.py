"""The one exception, and the one warning, that a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the file, column, row or field, what was found, what was expected and
    what to do. The command line prints it without a stack trace and exits with status 2.
    """


class UnseenWarning(UserWarning):
    """New rows hold something that the training table did not: a category, or a missing value.

    It is encoded by a rule, and the prediction may mean little. To make it an error:
    ``warnings.simplefilter("error", bnnmcmc.UnseenWarning)``.
    """
