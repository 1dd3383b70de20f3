from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Question(_message.Message):
    __slots__ = ("call", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: Call
    data: bytes
    def __init__(self, call: _Optional[_Union[Call, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Answer(_message.Message):
    __slots__ = ("reply", "data")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    reply: Reply
    data: bytes
    def __init__(self, reply: _Optional[_Union[Reply, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("version", "fingerprint", "run_id", "node_id", "client_id", "settings", "content")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    version: str
    fingerprint: str
    run_id: int
    node_id: int
    client_id: str
    settings: _containers.RepeatedCompositeFieldContainer[Entry]
    content: Content
    def __init__(self, version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., run_id: _Optional[int] = ..., node_id: _Optional[int] = ..., client_id: _Optional[str] = ..., settings: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., content: _Optional[_Union[Content, _Mapping]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("content", "kept")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    content: Content
    kept: bool
    def __init__(self, content: _Optional[_Union[Content, _Mapping]] = ..., kept: bool = ...) -> None: ...

class Content(_message.Message):
    __slots__ = ("records", "digest")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[Record]
    digest: bytes
    def __init__(self, records: _Optional[_Iterable[_Union[Record, _Mapping]]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("name", "arrays", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    arrays: Arrays
    values: Values
    def __init__(self, name: _Optional[str] = ..., arrays: _Optional[_Union[Arrays, _Mapping]] = ..., values: _Optional[_Union[Values, _Mapping]] = ...) -> None: ...

class Arrays(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ArraySpec]
    def __init__(self, items: _Optional[_Iterable[_Union[ArraySpec, _Mapping]]] = ...) -> None: ...

class ArraySpec(_message.Message):
    __slots__ = ("key", "dtype", "shape", "stype", "size")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    key: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    stype: str
    size: int
    def __init__(self, key: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., stype: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class Values(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: Value
    def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...

class Value(_message.Message):
    __slots__ = ("number", "whole", "flag", "text", "raw", "numbers", "wholes", "flags", "texts", "raws")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    WHOLES_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    RAWS_FIELD_NUMBER: _ClassVar[int]
    number: float
    whole: int
    flag: bool
    text: str
    raw: bytes
    numbers: Numbers
    wholes: Wholes
    flags: Flags
    texts: Texts
    raws: Raws
    def __init__(self, number: _Optional[float] = ..., whole: _Optional[int] = ..., flag: bool = ..., text: _Optional[str] = ..., raw: _Optional[bytes] = ..., numbers: _Optional[_Union[Numbers, _Mapping]] = ..., wholes: _Optional[_Union[Wholes, _Mapping]] = ..., flags: _Optional[_Union[Flags, _Mapping]] = ..., texts: _Optional[_Union[Texts, _Mapping]] = ..., raws: _Optional[_Union[Raws, _Mapping]] = ...) -> None: ...

class Numbers(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, items: _Optional[_Iterable[float]] = ...) -> None: ...

class Wholes(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, items: _Optional[_Iterable[int]] = ...) -> None: ...

class Flags(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[bool]
    def __init__(self, items: _Optional[_Iterable[bool]] = ...) -> None: ...

class Texts(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, items: _Optional[_Iterable[str]] = ...) -> None: ...

class Raws(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, items: _Optional[_Iterable[bytes]] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Quota(_message.Message):
    __slots__ = ("key", "used", "allowed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_FIELD_NUMBER: _ClassVar[int]
    key: str
    used: float
    allowed: float
    def __init__(self, key: _Optional[str] = ..., used: _Optional[float] = ..., allowed: _Optional[float] = ...) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("version", "fingerprint", "model", "quantization", "device", "runs", "absent", "doing", "seconds", "stopping", "trained", "evaluated", "from_disk", "kept_files", "kept_bytes", "free_bytes", "limits", "quotas", "private_runs", "private_bytes")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    DOING_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    FROM_DISK_FIELD_NUMBER: _ClassVar[int]
    KEPT_FILES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_RUNS_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    version: str
    fingerprint: str
    model: str
    quantization: str
    device: str
    runs: _containers.RepeatedScalarFieldContainer[str]
    absent: _containers.RepeatedScalarFieldContainer[str]
    doing: str
    seconds: float
    stopping: bool
    trained: int
    evaluated: int
    from_disk: int
    kept_files: int
    kept_bytes: int
    free_bytes: int
    limits: _containers.RepeatedCompositeFieldContainer[Entry]
    quotas: _containers.RepeatedCompositeFieldContainer[Quota]
    private_runs: int
    private_bytes: int
    def __init__(self, version: _Optional[str] = ..., fingerprint: _Optional[str] = ..., model: _Optional[str] = ..., quantization: _Optional[str] = ..., device: _Optional[str] = ..., runs: _Optional[_Iterable[str]] = ..., absent: _Optional[_Iterable[str]] = ..., doing: _Optional[str] = ..., seconds: _Optional[float] = ..., stopping: bool = ..., trained: _Optional[int] = ..., evaluated: _Optional[int] = ..., from_disk: _Optional[int] = ..., kept_files: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., limits: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., quotas: _Optional[_Iterable[_Union[Quota, _Mapping]]] = ..., private_runs: _Optional[int] = ..., private_bytes: _Optional[int] = ...) -> None: ...
