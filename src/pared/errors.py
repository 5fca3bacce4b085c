"""What a user reads when something is wrong: one class, one clear sentence."""


class ParedError(Exception):
    """A mistake in what was requested or found, reported in one line.

    The message names the thing, says what was found, what was expected and what to do.
    The command line prints it and exits with code 2; nothing has been written or overwritten.
    """


class DamagedError(ParedError):
    """A checkpoint that does not hold what it should.

    Attributes:
        what: is wrong.
    """

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}" if advice else what)
        self.what = what


class UnreachableError(ParedError):
    """Data that this machine has not got, and that cannot be read where they are published."""


class TextTooShortError(ParedError):
    """A text has fewer tokens than are asked for, or cannot be cut in parts."""
