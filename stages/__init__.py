"""The workflow around `defense`: one module per stage; the rooms below serve them."""

FAILED = 2  # exit status: something that the user can mend
TIME_IS_UP = 75  # exit status: the time limit ended it; the same command goes on
TOO_SHORT = 76  # exit status: the time limit is too short for any piece of the work


class StageError(Exception):
    """An error that the user can fix; the command line prints it as one line and exits with 2."""


class WindowTooShort(StageError):  # noqa: N818 - of a kind with Stopped
    """No piece of work fits into the time limit, so running again would not help."""


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The user, the system or the time limit asked the stage to stop; what was done is kept."""

    def __init__(self, message: str, *, time_is_up: bool) -> None:
        super().__init__(message)
        self.time_is_up = time_is_up
