"""The package's exceptions, and escaping of text for terminals."""


class VerificationError(Exception):
    """The verification of a result failed."""


def printable(text: str) -> str:
    """Escape control characters: names come from folders and files, and may be hostile."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class EncoderWarning(UserWarning):
    """An encoder may run with other settings than its weights were trained with."""


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the last good state is saved."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 image, 2 images."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
