"""The error that is raised for a user's mistake."""


class UserError(Exception):
    """A mistake that the user can put right, told without a traceback.

    The message says what was given, what is allowed, and where it stands. Commands end with exit
    code 2 on it (see `exit_on_user_error`).
    """
