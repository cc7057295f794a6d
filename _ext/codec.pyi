from collections.abc import Callable
from typing import Any, Final, Generic, TypeAlias, TypeVar, final, overload

_T = TypeVar("_T")
_R = TypeVar("_R", bound=tuple[Any, ...])
_Buffer: TypeAlias = bytes | bytearray | memoryview

IDENT: Final[str]

class EncodeError(ValueError):
    path: str
    def __init__(self, message: str, path: str = ...) -> None: ...

class EncodeTypeError(TypeError):
    path: str
    def __init__(self, message: str, path: str = ...) -> None: ...

class TooLargeError(EncodeError):
    size: int
    limit: int
    def __init__(self, message: str, path: str = ..., size: int = ..., limit: int = ...) -> None: ...

class DecodeError(ValueError):
    offset: int
    def __init__(self, message: str, offset: int = ...) -> None: ...

@final
class Ext:
    def __new__(cls, code: int, data: Any, head: bytes = b"") -> Ext: ...
    @property
    def code(self) -> int: ...
    @property
    def data(self) -> Any: ...
    @property
    def head(self) -> bytes: ...

@final
class TaskHeader:
    @property
    def id(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def lane(self) -> int: ...
    @property
    def max_retries(self) -> int | None: ...
    @property
    def timeout(self) -> float | None: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def reply(self) -> str | None: ...
    @property
    def flags(self) -> int: ...
    @property
    def body_at(self) -> int: ...

@final
class TaskCodec(Generic[_R]):
    @overload
    def __new__(
        cls,
        new_id: Callable[[], str] | None,
        default: Callable[[Any], Any] | None = None,
        ext_hook: Callable[[int, memoryview], Any] | None = None,
        *,
        max_depth: int = 64,
    ) -> TaskCodec[tuple[str, int, bytes, bool, float]]: ...
    @overload
    def __new__(
        cls,
        new_id: Callable[[], str] | None,
        default: Callable[[Any], Any] | None = None,
        ext_hook: Callable[[int, memoryview], Any] | None = None,
        record: type[_R] = ...,
        max_depth: int = 64,
    ) -> TaskCodec[_R]: ...
    @property
    def new_id(self) -> Callable[[], str] | None: ...
    @property
    def default(self) -> Callable[[Any], Any] | None: ...
    @property
    def ext_hook(self) -> Callable[[int, memoryview], Any] | None: ...
    @property
    def record(self) -> type[_R]: ...
    @property
    def max_depth(self) -> int: ...
    def encode(
        self,
        task: object,
        task_id: str | None = None,
        max_bytes: int = 1048576,
        reply: str | None = None,
        flags: int = 0,
    ) -> _R: ...
    def encode_many(
        self,
        tasks: list[Any],
        ids: IdMaker,
        now: float,
        max_bytes: int = 1048576,
        reply: str | None = None,
        flags: int = 0,
    ) -> list[_R]: ...
    def decode_body(self, frame: bytes, header: TaskHeader) -> dict[str, Any]: ...
    def decode(self, frame: bytes) -> dict[str, Any]: ...

@final
class TaskMaker(Generic[_T]):
    def __new__(cls, codec: TaskCodec[Any], kind: type[_T]) -> TaskMaker[_T]: ...
    @property
    def codec(self) -> TaskCodec[Any]: ...
    @property
    def kind(self) -> type[_T]: ...
    def make(self, frame: bytes, header: TaskHeader | None, attempt: int, fence: int) -> tuple[TaskHeader, _T]: ...

@final
class IdMaker:
    def __new__(cls, seed: str) -> IdMaker: ...
    @property
    def seed(self) -> str: ...
    def make(self, now: float) -> str: ...

def decode_header(frame: bytes) -> TaskHeader: ...
def packb(
    value: object,
    default: Callable[[Any], Any] | None = None,
    max_bytes: int = 2147483647,
    max_depth: int = 64,
    root: str = "value",
) -> bytes: ...
def unpackb(data: _Buffer, ext_hook: Callable[[int, memoryview], Any] | None = None, max_depth: int = 64) -> Any: ...
def unpack_first(
    data: _Buffer, ext_hook: Callable[[int, memoryview], Any] | None = None, max_depth: int = 64
) -> tuple[Any, int]: ...
