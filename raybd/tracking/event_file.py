"""TensorBoard's event files, as bytes: scalars, and the settings of a run for its table of hyperparameters.

Messages of tensorflow/core/util/event.proto, summary.proto and tensorboard/plugins/hparams/plugin_data.proto, each
framed as a TFRecord. Written here, for what writes them elsewhere imports torch, which a driver may do without.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping

_POLYNOMIAL = 0x82F63B78  # of CRC-32C, reversed
_DOUBLE, _TEXT, _FLOAT, _WHOLE = 1, 2, 5, 0  # kinds of fields on the wire
_SUCCESS, _FAILURE = 1, 2  # hparams' Status
_START, _END, _EXPERIMENT = 3, 4, 2  # fields of HParamsPluginData


def _table() -> list[int]:
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        found.append(byte)
    return found


_TABLE = _table()


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of some bytes, masked as TFRecords have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def head(time: float) -> bytes:
    """Return how an event file begins.

    Args:
        time: seconds since 1970, as in the other functions.
    """
    return _event(time, 0, _bytes(3, b"brain.Event:2"))


def scalars(time: float, step: int, values: Mapping[str, float]) -> bytes:
    """Return the event of some values at one step."""
    told = [_bytes(1, _bytes(1, name.encode()) + _key(2, _FLOAT) + _float(v)) for name, v in values.items()]
    return _event(time, step, _bytes(5, b"".join(told)))


def hparams(
    start: float, end: float, settings: Mapping[str, float | str], metrics: Iterable[str], *, ok: bool
) -> bytes:
    """Return the events that put a run into TensorBoard's table of hyperparameters.

    Args:
        metrics: names of scalars to show beside the settings.
        ok: whether it ended well.
    """
    kinds = {name: 1 if isinstance(value, str) else 3 for name, value in settings.items()}  # DataType: text, number
    infos = [_bytes(4, _bytes(1, name.encode()) + _whole(4, kind)) for name, kind in kinds.items()]
    shown = [_bytes(5, _bytes(1, _bytes(2, name.encode()))) for name in metrics]
    pairs = [_bytes(1, _bytes(1, name.encode()) + _bytes(2, _value(value))) for name, value in settings.items()]
    parts = (
        ("experiment", _EXPERIMENT, b"".join([*infos, *shown])),
        ("session_start_info", _START, b"".join([*pairs, _key(5, _DOUBLE) + struct.pack("<d", start)])),
        ("session_end_info", _END, _whole(1, _SUCCESS if ok else _FAILURE) + _key(2, _DOUBLE) + struct.pack("<d", end)),
    )
    return b"".join(_event(start, 0, _bytes(5, _plugin(name, field, content))) for name, field, content in parts)


def _plugin(name: str, field: int, content: bytes) -> bytes:
    """Return a summary that carries data of the plugin hparams."""
    data = _bytes(1, b"hparams") + _bytes(2, _bytes(field, content))
    return _bytes(1, _bytes(1, f"_hparams_/{name}".encode()) + _bytes(9, _bytes(1, data)))


def _value(value: float | str) -> bytes:
    """Return a setting as google.protobuf.Value."""
    if isinstance(value, str):
        return _bytes(3, value.encode("utf-8", "backslashreplace"))
    return _key(2, _DOUBLE) + struct.pack("<d", value)


def _event(time: float, step: int, content: bytes) -> bytes:
    data = _key(1, _DOUBLE) + struct.pack("<d", time) + _whole(2, step) + content
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def _key(field: int, kind: int) -> bytes:
    return bytes(_varint(field << 3 | kind))


def _bytes(field: int, content: bytes) -> bytes:
    return _key(field, _TEXT) + bytes(_varint(len(content))) + content


def _whole(field: int, value: int) -> bytes:
    return _key(field, _WHOLE) + bytes(_varint(value))


def _float(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:  # larger than a float of 32 bits
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _varint(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
