"""How numbers of things are said."""


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """Return a number and what it counts: ``1 example``, ``2 examples``.

    Args:
        n: How many there are.
        noun: What one of them is called.
        plural: What several are called; with an s where it is not given.
    """
    return f"{n} {noun if n == 1 else plural or noun + 's'}"
