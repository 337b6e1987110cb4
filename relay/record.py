"""One row of the outbox as one Kafka record: CloudEvents in the binary mode of its Kafka protocol binding, Avro bytes
framed: by Avro's own frame, or by that of a schema registry (relay/registry.py).

Sources: CloudEvents Kafka Protocol Binding 1.0.2, section 3.2; Avro specification 1.12, "Single-object encoding".
"""

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from relay.errors import EventRefused

Header = tuple[str, bytes | None]

_SPEC: Header = ("ce_specversion", b"1.0")
_AVRO: Header = ("content-type", b"application/avro")
_MAGIC = b"\xc3\x01"


class Records:
    """Makes records of rows as `Queries.fetch` returns them. What repeats from row to row is made once and kept."""

    def __init__(
        self, source: str, registered: Mapping[tuple[str, int], bytes] | None = None, *, time: bool = False
    ) -> None:
        """`registered`: frames of a registry by topic and fingerprint, those of all rows to come; None: no registry.
        `time`: say ce_time too."""
        self._registered = registered
        self._time = time
        self._source: Header = ("ce_source", source.encode())
        self._types: dict[str, Header] = {}
        self._frames: dict[int, bytes] = {}

    def produce(self, rows: Iterable[Any], produce: Callable[..., None]) -> None:
        """Hand each row to `produce`, in order.

        Key: the row's, in UTF-8. Value: C3 01 and the fingerprint, or the registry's frame, then the Avro bytes;
        without a fingerprint the row's bytes as they are; null for a tombstone. Headers: ce_specversion, ce_id,
        ce_type, ce_source, content-type, ce_time where it is asked for, then the row's own. Timestamp: created_at.

        Raises:
            EventRefused: headers or created_at of a row cannot be said in Kafka.
        """
        source, types, frames, registered = self._source, self._types, self._frames, self._registered
        time = self._time
        for _seq, id_, type_, topic, key, value, fingerprint, own, created in rows:
            kind = types.get(type_) or self._type(type_)
            if fingerprint is None:
                headers = [_SPEC, ("ce_id", id_), kind, source]
            else:
                headers = [_SPEC, ("ce_id", id_), kind, source, _AVRO]
                if value is None:
                    pass
                elif registered is None:
                    value = (frames.get(fingerprint) or self._frame(fingerprint)) + value
                else:
                    value = registered[topic, fingerprint] + value
            if created is None or created < 0:
                raise EventRefused(f"event {id_} was created at no moment that Kafka can tell")
            if time:
                headers.append(("ce_time", _rfc3339(id_, created)))
            if own is not None:
                headers += _own(id_, own)
            produce(topic, value, key, -1, None, None, created, headers)

    def _type(self, type_: str) -> Header:
        header = self._types[type_] = ("ce_type", type_.encode())
        return header

    def _frame(self, fingerprint: int) -> bytes:
        frame = self._frames[fingerprint] = _MAGIC + fingerprint.to_bytes(8, "little", signed=True)
        return frame


def _rfc3339(id_: str, milliseconds: int) -> bytes:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").encode()
    except (ValueError, OverflowError, OSError) as error:  # whichever the platform has for years after 9999
        raise EventRefused(f"event {id_} was created in no year that ce_time can tell") from error


def _own(id_: str, headers: str) -> list[Header]:
    """A row's own headers. Any language may have written them: whatever JSON it is, the lane must not stand still."""
    own = json.loads(headers)
    if own is None:  # what some mappers write for "no value"
        return []
    if not isinstance(own, dict) or not all(text is None or isinstance(text, str) for text in own.values()):
        raise EventRefused(f"the headers of event {id_} are no JSON object whose values are texts or null")
    return [(name, None if text is None else text.encode()) for name, text in own.items()]
