"""The workflow around `defense`: files, parameters, options, progress. One module per stage."""


class StageError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 2."""


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The user or the system asked the stage to stop; what was done is kept."""
