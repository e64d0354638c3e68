"""The error that says: this input cannot be used."""


class Refused(ValueError):
    """An input, a setting or a network that cannot be used; the message names it and says what to do.

    The suite prints the message as one line. Any other ValueError is a defect and keeps its traceback.
    """
