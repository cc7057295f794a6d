# Errors of the codec and the sentences they carry. Nothing here runs unless something is refused.


class EncodeError(ValueError):
    """A value cannot be encoded; ``path`` leads to it (``input.rows[3].x``)."""

    def __init__(self, message, path=""):
        super().__init__(message)
        self.path = path


class EncodeTypeError(TypeError):
    """A value has a type that does not travel; ``path`` leads to it."""

    def __init__(self, message, path=""):
        super().__init__(message)
        self.path = path


class TooLargeError(EncodeError):
    """The result would exceed ``limit`` bytes; ``size`` is a lower bound of it, ``path`` is where it was noticed."""

    def __init__(self, message, path="", size=0, limit=0):
        super().__init__(message, path)
        self.size = size
        self.limit = limit


class DecodeError(ValueError):
    """The bytes are not what was expected; ``offset`` is where that was noticed."""

    def __init__(self, message, offset=0):
        super().__init__(message)
        self.offset = offset


cdef str show(object value):
    """What came, in a few words; never runs code of the value's class, never prints megabytes."""
    cdef type kind = type(value)
    if value is None or kind is bool or kind is float:
        return repr(value)
    if kind is int:
        # repr of a huge int is quadratic, and refused by CPython above 4300 digits (CVE-2020-10735).
        return repr(value) if -(1 << 64) < value < (1 << 65) else f"an int of {value.bit_length()} bits"
    if kind is str:
        return ascii(value) if len(value) <= 60 else f"{ascii(value[:60])}... of {len(value)} characters"
    return f"{'an' if kind.__name__[:1] in 'aeiouAEIOU' else 'a'} {kind.__name__}"


cdef str advice(object value):
    """How a value of a well-known type is usually sent."""
    cdef type kind = type(value)
    cdef str name = kind.__name__
    if name in ("datetime", "date", "time", "Timestamp"):
        return "; send value.isoformat()"
    if name == "timedelta":
        return "; send value.total_seconds()"
    if name in ("set", "frozenset", "generator", "deque", "range", "dict_keys", "dict_values", "map", "filter", "zip"):
        return "; send list(value)"
    if name in ("Decimal", "UUID", "Fraction", "PosixPath", "WindowsPath", "complex"):
        return "; send str(value)"
    if name == "coroutine":
        return "; await it first"
    for base in kind.__mro__:
        if base.__name__ == "Enum":
            return "; send value.value"
        if "__dataclass_fields__" in base.__dict__:
            return "; send dataclasses.asdict(value)"
        if "model_dump" in base.__dict__:
            return "; send value.model_dump(mode='json')"
    return "; send str(value) or a dict of its fields"


cdef str step_text(object key, bint first):
    """One step of a path, by a key: ``.name`` or ``['odd name']``."""
    if isinstance(key, str):
        if key.isidentifier() and len(key) <= 60:
            return str.__str__(key) if first else f".{key}"
        return f"[{ascii(key[:60])}]"
    if isinstance(key, int) and not isinstance(key, bool) and -(1 << 64) < key < (1 << 65):
        return f"[{int.__repr__(key)}]"
    return f"[{show(key)}]"


cdef str enc_path(Enc* e, str root, bint* cyclic):
    """The way to the culprit; for a cycle, the way to the first container that is met again inside itself."""
    cdef list parts = []
    cdef dict seen = {}
    cdef int i
    cyclic[0] = False
    for i in range(e.nsteps - 1, -1, -1):
        if e.err == E_DEPTH:
            at = <size_t>e.steps[i].container
            if at in seen:
                cyclic[0] = True
                break
            seen[at] = i
        if e.steps[i].key == NULL:
            parts.append(f"[{e.steps[i].index}]")
        else:
            parts.append(step_text(<object>e.steps[i].key, not root and not parts))
    if len(parts) > 24:
        parts[12 : len(parts) - 12] = ["..."]
    return root + "".join(parts)


cdef int enc_raise(Enc* e, str root) except -1:
    cdef bint cyclic = False
    if e.err == E_RAISED:
        return enc_reraise(e, root)
    path = enc_path(e, root, &cyclic)
    where = path or "task"
    value = None if e.culprit == NULL else <object>e.culprit
    if e.err == E_TYPE:
        raise EncodeTypeError(f"{where}: {show(value)} does not travel{advice(value)}", path)
    if e.err == E_KEY:
        raise EncodeTypeError(f"{where}: the keys of a dict must be str, int or bytes, got {show(value)}", path)
    if e.err == E_INT:
        raise EncodeError(f"{where}: an int must be from -2**63 to 2**64 - 1, got {show(value)}; send str(value)", path)
    if e.err == E_TEXT:
        raise EncodeError(f"{where}: a str must be valid Unicode, got a lone surrogate in {show(value)}", path)
    if e.err == E_CHANGED:
        raise EncodeError(f"{where}: the {type(value).__name__} changed while it was encoded", path)
    if e.err == E_BUFFER:
        raise EncodeTypeError(f"{where}: {show(value)} is not one contiguous run of bytes; send bytes(value)", path)
    if e.err == E_DEPTH:
        why = "the container contains itself" if cyclic else f"nested deeper than {e.max_depth} levels"
        raise EncodeError(f"{where}: {why}", path)
    raise TooLargeError(
        f"{where}: the encoded size, {e.size} bytes or more, exceeds the limit of {e.limit} bytes; "
        "keep the data elsewhere and send a reference, or raise the limit", path, e.size, e.limit)


cdef int enc_reraise(Enc* e, str root) except -1:
    """An exception is set. A hook's bare EncodeError gets the path; anything else passes as it is."""
    cdef bint cyclic = False
    try:
        orc_raised()
    except (EncodeError, EncodeTypeError) as error:
        if error.path:
            raise
        path = enc_path(e, root, &cyclic)
        raise type(error)(f"{path or 'task'}: {error}", path) from None
