"""What a client is told when something is wrong: RFC 9457 problem details with a stable code and a hint."""

from __future__ import annotations

import http
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from tmca.errors import TMCAError
from tmca.server.messages import Failure

PROBLEM_TYPE = "application/problem+json"


class ServerError(TMCAError):
    """A request that is not answered; further headers may say when to try again."""

    headers: Mapping[str, str] = {}


class UnauthorizedError(ServerError):
    """No key, or none of ours."""

    http_status = 401
    code = "unauthorized"


class ForbiddenError(ServerError):
    """From another site's page, or to a host name that is not ours."""

    http_status = 403
    code = "forbidden"


class NotFoundError(ServerError):
    """There is no such job, or page."""

    http_status = 404
    code = "not_found"


class NotAcceptableError(ServerError):
    """None of the types that the client accepts can be had of this image."""

    http_status = 406
    code = "not_acceptable"


class SlowClientError(ServerError):
    """The request did not arrive in time."""

    http_status = 408
    code = "request_timeout"


class ConflictError(ServerError):
    """Not in this state of the job."""

    http_status = 409
    code = "conflict"


class TooLargeError(ServerError):
    """More bytes than are taken."""

    http_status = 413
    code = "too_large"


class UnsupportedTypeError(ServerError):
    """Not a file of a kind that is read."""

    http_status = 415
    code = "unsupported_type"


class InvalidRequestError(ServerError):
    """A field is missing or of another type."""

    http_status = 422
    code = "invalid_request"


class BusyError(ServerError):
    """Too much is waiting already.

    Args:
        message: What was got and what was expected.
        retry_after: Seconds after which to try again.
    """

    http_status = 429
    code = "busy"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, hint=f"try again in {retry_after} seconds")
        self.headers = {"Retry-After": str(retry_after)}


class ClientGoneError(ServerError):
    """The client closed the connection; nobody reads the answer."""

    http_status = 499
    code = "client_gone"


class NotReadyError(ServerError):
    """The models are not loaded, or the server stops."""

    http_status = 503
    code = "not_ready"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.headers = {"Retry-After": "5"}


class RemoteError(ServerError):
    """What the worker said is wrong."""

    def __init__(self, status: int, code: str, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.http_status = status  # type: ignore[misc]
        self.code = code  # type: ignore[misc]

    @classmethod
    def of(cls, failure: Failure) -> RemoteError:
        """Return what the worker's message says."""
        return cls(failure.status, failure.code, failure.message, failure.hint)


def problem(error: TMCAError, request_id: str = "") -> JSONResponse:
    """Return the response that tells an error."""
    try:
        title = http.HTTPStatus(error.http_status).phrase
    except ValueError:
        title = "Error"
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": title,
        "status": error.http_status,
        "detail": error.message,
        "code": error.code,
        "hint": error.hint,
    }
    if request_id:
        body["instance"] = f"urn:request:{request_id}"
    headers = dict(error.headers) if isinstance(error, ServerError) else {}
    return JSONResponse(body, error.http_status, headers=headers, media_type=PROBLEM_TYPE)
