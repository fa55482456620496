"""What the training examples share: data, the training loop, measuring, and comparing backends."""


class UsageError(Exception):
    """Something that the user gave cannot be used; the message says what is allowed."""
