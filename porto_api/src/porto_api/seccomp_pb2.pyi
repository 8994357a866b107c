from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    Allow: _ClassVar[EAction]
    Errno: _ClassVar[EAction]
    Trace: _ClassVar[EAction]
    Notify: _ClassVar[EAction]
    Log: _ClassVar[EAction]
    Trap: _ClassVar[EAction]
    KillProcess: _ClassVar[EAction]
    Kill: _ClassVar[EAction]

class ECompare(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    Ne: _ClassVar[ECompare]
    Lt: _ClassVar[ECompare]
    Le: _ClassVar[ECompare]
    Eq: _ClassVar[ECompare]
    Ge: _ClassVar[ECompare]
    Gt: _ClassVar[ECompare]
    MaskedEq: _ClassVar[ECompare]
Allow: EAction
Errno: EAction
Trace: EAction
Notify: EAction
Log: EAction
Trap: EAction
KillProcess: EAction
Kill: EAction
Ne: ECompare
Lt: ECompare
Le: ECompare
Eq: ECompare
Ge: ECompare
Gt: ECompare
MaskedEq: ECompare

class TArg(_message.Message):
    __slots__ = ("index", "compare", "value")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    COMPARE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    index: int
    compare: ECompare
    value: int
    def __init__(self, index: _Optional[int] = ..., compare: _Optional[_Union[ECompare, str]] = ..., value: _Optional[int] = ...) -> None: ...

class TAction(_message.Message):
    __slots__ = ("action", "value")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    action: EAction
    value: int
    def __init__(self, action: _Optional[_Union[EAction, str]] = ..., value: _Optional[int] = ...) -> None: ...

class TRule(_message.Message):
    __slots__ = ("syscall", "args", "action")
    SYSCALL_FIELD_NUMBER: _ClassVar[int]
    ARGS_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    syscall: str
    args: _containers.RepeatedCompositeFieldContainer[TArg]
    action: TAction
    def __init__(self, syscall: _Optional[str] = ..., args: _Optional[_Iterable[_Union[TArg, _Mapping]]] = ..., action: _Optional[_Union[TAction, _Mapping]] = ...) -> None: ...

class TProfile(_message.Message):
    __slots__ = ("name", "default_action", "rules")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_ACTION_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    name: str
    default_action: TAction
    rules: _containers.RepeatedCompositeFieldContainer[TRule]
    def __init__(self, name: _Optional[str] = ..., default_action: _Optional[_Union[TAction, _Mapping]] = ..., rules: _Optional[_Iterable[_Union[TRule, _Mapping]]] = ...) -> None: ...
