"""Our errors as the exceptions that Dynamo's frontend turns into HTTP answers.

What the frontend of Dynamo 1.6.1 does, found by raising each from a worker and reading the answer
(the body of anything but an `InvalidArgument` is replaced by the status' standard text):

    raised                      the client gets              and the worker
    InvalidArgument(message)    400 with the message         stays in rotation
    HttpError(429 or 503)       that status, standard text   stays in rotation
    HttpError(500 or 502)       500, backend_status          stays in rotation
    HttpError(504)              500                          is left out for 5 seconds
    WorkerUnavailable           503                          is left out for 5 seconds

So a client's mistake is always an `InvalidArgument`, whose message names the image and the reason;
a missing encode worker must not look like a missing PD worker, hence 503 by `HttpError`; and 504
is never used.
"""

from __future__ import annotations

from dynamo.llm.exceptions import HttpError, InvalidArgument

from trtllm_mm_cache.errors import MmCacheError, RequestError


def as_dynamo_error(error: MmCacheError) -> Exception:
    """Return the exception to raise from a request handler for `error`."""
    text = f"{error} [{error.code}]"
    answer: Exception
    if isinstance(error, RequestError):
        answer = InvalidArgument(text)
    elif error.retryable and error.http_status in (503, 504):
        answer = HttpError(503, text)
    else:
        answer = HttpError(502 if error.http_status == 502 else 500, text)
    return answer
