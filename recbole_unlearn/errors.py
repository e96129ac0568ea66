class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what is wrong, and what to do.

    The command line prints it and exits with status 2; nothing has been written when it is raised.
    """
