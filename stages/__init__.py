"""The workflow around `defense`: files, parameters, options, progress. One module per stage."""


class StageError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 2."""


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The user, the system or the time limit asked the stage to stop; what was done is kept."""

    def __init__(self, message: str, *, time_is_up: bool) -> None:
        super().__init__(message)
        self.time_is_up = time_is_up
