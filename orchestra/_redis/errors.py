"""What an error reply of Redis means: its code, and the orchestra error it becomes. Pure functions.

The one table for replies that came over a wire and for those that redis-py has already turned into its exceptions.
Refuses to own what to do about them: healing NOGROUP or NOSCRIPT is the caller's.
"""

from __future__ import annotations

import hiredis

from orchestra.errors import StoreAuthError, StoreError, StoreFullError, StoreUnavailableError

ReplyError = hiredis.ReplyError

_ADVICE: dict[str, tuple[type[StoreError], str]] = {
    "NOAUTH": (StoreAuthError, "give a password in the address"),
    "WRONGPASS": (StoreAuthError, "check the user name and password of the address"),
    "NOPERM": (StoreAuthError, "grant the user this command and these keys (ACL SETUSER)"),
    "DENIED": (StoreAuthError, "the server is in protected mode: set a password or bind it to loopback"),
    "OOM": (StoreFullError, "nothing was written: raise maxmemory or drain the queues"),
    "LOADING": (StoreUnavailableError, "it is loading its data: try again in a moment"),
    "BUSY": (StoreUnavailableError, "a script blocks it: wait, or SCRIPT KILL"),
    "READONLY": (StoreUnavailableError, "it is a replica: connect to the master"),
    "MASTERDOWN": (StoreUnavailableError, "its master is down: try again after the failover"),
    "CLUSTERDOWN": (StoreUnavailableError, "the cluster is down: try again after it has healed"),
    "TRYAGAIN": (StoreUnavailableError, "slots are moving: try again"),
    "NOREPLICAS": (StoreUnavailableError, "too few replicas are in reach for min-replicas-to-write"),
    "MISCONF": (StoreUnavailableError, "it cannot persist and refuses writes: look at its disk and log"),
    "MAXCLIENTS": (StoreUnavailableError, "it has no connection left: raise maxclients or use fewer"),
}

# redis-py turns some codes into classes and cuts them from the message.
_CODE_OF_CLASS = {
    "NoScriptError": "NOSCRIPT",
    "BusyLoadingError": "LOADING",
    "ReadOnlyError": "READONLY",
    "OutOfMemoryError": "OOM",
    "NoPermissionError": "NOPERM",
    "AuthenticationError": "WRONGPASS",
    "AuthenticationWrongNumberOfArgsError": "WRONGPASS",
    "AuthorizationError": "NOPERM",
    "ExecAbortError": "EXECABORT",
    "MasterDownError": "MASTERDOWN",
    "ClusterDownError": "CLUSTERDOWN",
    "TryAgainError": "TRYAGAIN",
    "MovedError": "MOVED",
    "AskError": "ASK",
}


def reply_code(exc: BaseException) -> str:
    """The code Redis put before an error (``"NOGROUP"``, ``"NOSCRIPT"``, ``"ERR"``, …), or ``""`` for other errors.

    ``exc`` may be a :data:`ReplyError` from a batch, an exception of redis-py, or an
    :class:`~orchestra.errors.StoreError` made from either of them.
    """
    seen: BaseException | None = exc
    while seen is not None:  # redis-py wraps what AUTH answered into a plain ConnectionError
        code = _own_code(seen)
        if code:
            return code
        seen = seen.__cause__
    return ""


def _own_code(exc: BaseException) -> str:
    known = _CODE_OF_CLASS.get(type(exc).__name__)
    if known:
        return known
    text = str(exc)
    if not isinstance(exc, ReplyError) and all(kind.__name__ != "ResponseError" for kind in type(exc).__mro__):
        return ""
    if "max number of clients" in text:
        return "MAXCLIENTS"
    if "ACL failure in script" in text or "user executing the script can't" in text:  # since 7.2, and before
        return "NOPERM"
    word = text.split(" ", 1)[0]
    return word if word.isascii() and word.isalpha() and word.isupper() and len(word) > 1 else ""


def reply_error(exc: BaseException, where: str = "") -> StoreError:
    """The :class:`~orchestra.errors.StoreError` for an error reply; ``where`` is an address fit for logs.

    ``exc`` becomes its ``__cause__``, which is what :func:`reply_code` looks at.
    """
    kind, advice = _ADVICE.get(reply_code(exc), (StoreError, ""))
    error = kind(f"{where or 'Redis'} answered {str(exc)!r}{advice and f': {advice}'}")
    error.__cause__ = exc
    return error
