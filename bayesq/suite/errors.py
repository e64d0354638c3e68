"""The exception whose message is written for the user."""


class UserError(Exception):
    """Bad input or a missing resource: one clear line that names the config key and the remedy.

    The command line prints the message without a traceback and exits with code 1.
    """
