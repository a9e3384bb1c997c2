"""What cannot be simulated: an error that names the field, what is wrong with it, and the remedy."""

from __future__ import annotations


class Invalid(ValueError):
    """A figure that cannot be. `field` is its path where it was given in a file, else its name."""

    def __init__(self, field: str, message: str, remedy: str) -> None:
        self.field, self.message, self.remedy = field, message, remedy
        super().__init__(f"{field}: {message}; {remedy}")
