"""What the API server can answer instead of an object: one class for each way to go on."""

from __future__ import annotations


class ApiError(Exception):
    """A call that did not succeed. `status` is the HTTP status, 0 where there was no answer.

    The message is the server's own sentence, without the request's body: bodies may hold what nobody should read.
    """

    def __init__(self, message: str, *, status: int = 0, reason: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class NotFound(ApiError):
    """404: no such object, or no such kind (`kind_missing`): its CRD is not installed."""

    def __init__(self, message: str, *, kind_missing: bool = False, reason: str = "NotFound") -> None:
        super().__init__(message, status=404, reason=reason)
        self.kind_missing = kind_missing


class Conflict(ApiError):
    """409: another writer was there first: an object of that name, another uid or version, or another field owner."""


class Gone(ApiError):
    """410: the version asked for is too old: list again."""


class Invalid(ApiError):
    """400 or 422: the server refuses the body; the message names the field. Trying again does not help."""


class Forbidden(ApiError):
    """401 or 403: a right is missing."""


class Busy(ApiError):
    """429: wait for `retry_after_s`."""


class ServerError(ApiError):
    """5xx: may succeed later. The write may have happened or not."""


class Unreachable(ApiError):
    """No answer: refused, reset or timed out. The write may have happened or not."""


class Fenced(ApiError):
    """Not sent: the lease that allows writes is no longer held."""


class Stale(ApiError):
    """The server answered with a state older than one that was already seen: ask again."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Forbidden,
    403: Forbidden,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: Busy,
}


def from_status(
    status: int, message: str, *, reason: str = "", retry_after_s: float | None = None, kind_missing: bool = False
) -> ApiError:
    """The error of an HTTP status of 400 or above."""
    if status == 404:
        return NotFound(message, kind_missing=kind_missing, reason=reason or "NotFound")
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
    return kind(message, status=status, reason=reason, retry_after_s=retry_after_s)
