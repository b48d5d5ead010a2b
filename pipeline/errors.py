"""The two ways in which a run may end badly without being our bug.

The command line prints either as one sentence. Anything else is a bug and keeps its traceback.
"""


class AtomError(Exception):
    """The caller's mistake or the machine's state, told in one sentence: what, where, what to do. Exit code 2."""

    exit_code = 2


class RecipeError(AtomError):
    """A recipe (or data recipe) that cannot be run as it stands."""


class CheckFailed(AtomError):
    """The checked thing is bad: a gate of the release, or a byte that is not what its manifest says. Exit code 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """The job was asked to stop (SIGINT, SIGTERM, SIGUSR1, SIGUSR2). Not an Exception, so that no stage swallows it."""
