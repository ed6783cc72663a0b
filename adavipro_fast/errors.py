"""What can go wrong beside a bad request, and how text is made fit for a terminal."""


class VerificationError(Exception):
    """A result was checked and found wrong."""


def printable(text: str) -> str:
    """Escape what a terminal would take as a command: names come from folders and files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class EncoderWarning(UserWarning):
    """An encoder may run otherwise than its weights were trained."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the last good state is on the disk."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
