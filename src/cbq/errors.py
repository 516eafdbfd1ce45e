"""The one exception that means: the user's input was wrong."""


class InputError(ValueError):
    """A mistake in what the user gave: one line that says what was wrong and what is allowed.

    `cli.py` prints it without a traceback and exits with code 2. Everything else that is raised is a fault of ours.
    """
