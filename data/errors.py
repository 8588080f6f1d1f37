"""The one error type for what a user can mend."""


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is a whole sentence for that user: which file, row or field, what was wrong, what would be right.
    Commands print it without a traceback and exit with code 2.
    """
