from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClassifyRequest(_message.Message):
    __slots__ = ("text", "task", "top_k", "evidence")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    text: str
    task: str
    top_k: int
    evidence: bool
    def __init__(self, text: _Optional[str] = ..., task: _Optional[str] = ..., top_k: _Optional[int] = ..., evidence: _Optional[bool] = ...) -> None: ...

class ScoredLabel(_message.Message):
    __slots__ = ("name", "score", "chosen")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    score: float
    chosen: bool
    def __init__(self, name: _Optional[str] = ..., score: _Optional[float] = ..., chosen: _Optional[bool] = ...) -> None: ...

class EvidenceSpan(_message.Message):
    __slots__ = ("start", "end", "score")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    score: float
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("task", "labels", "truncated", "tokens", "queue_micros", "compute_micros", "model_version", "evidence")
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MICROS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MICROS_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    task: str
    labels: _containers.RepeatedCompositeFieldContainer[ScoredLabel]
    truncated: bool
    tokens: int
    queue_micros: int
    compute_micros: int
    model_version: str
    evidence: _containers.RepeatedCompositeFieldContainer[EvidenceSpan]
    def __init__(self, task: _Optional[str] = ..., labels: _Optional[_Iterable[_Union[ScoredLabel, _Mapping]]] = ..., truncated: _Optional[bool] = ..., tokens: _Optional[int] = ..., queue_micros: _Optional[int] = ..., compute_micros: _Optional[int] = ..., model_version: _Optional[str] = ..., evidence: _Optional[_Iterable[_Union[EvidenceSpan, _Mapping]]] = ...) -> None: ...

class ClassifyBatchRequest(_message.Message):
    __slots__ = ("texts", "task", "top_k", "evidence")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    task: str
    top_k: int
    evidence: bool
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., task: _Optional[str] = ..., top_k: _Optional[int] = ..., evidence: _Optional[bool] = ...) -> None: ...

class ClassifyBatchItem(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: ClassifyResponse
    error: _status_pb2.Status
    def __init__(self, response: _Optional[_Union[ClassifyResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class ClassifyBatchResponse(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[ClassifyBatchItem]
    def __init__(self, items: _Optional[_Iterable[_Union[ClassifyBatchItem, _Mapping]]] = ...) -> None: ...
