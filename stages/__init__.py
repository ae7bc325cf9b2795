"""The workflow around `defense`: files, parameters, options, progress. One module per stage."""


class StageError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 2."""
