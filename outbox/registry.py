"""The door to a schema registry that has Confluent's API: Confluent's own, Apicurio, Karapace, Redpanda.

Needs the extra `registry`: Confluent's client, whose settings are taken as they are (`url`, `basic.auth.user.info`,
`ssl.ca.location`, `bearer.auth.…`). Every method blocks.
Source: https://docs.confluent.io/platform/current/schema-registry/develop/api.html
"""

import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from outbox.errors import RegistryError, SchemaRefused, UsageError

SUBJECTS: Mapping[str, Callable[[str, str], str]] = {
    "TopicNameStrategy": lambda topic, _record: f"{topic}-value",
    "RecordNameStrategy": lambda _topic, record: record,
    "TopicRecordNameStrategy": lambda topic, record: f"{topic}-{record}",
}
"""Subject strategy, by the name that Confluent gave it → (topic, full name of the record) → subject."""

TIMEOUT = 10.0
"""Seconds for each of connecting, sending and receiving. The client's own default is to wait for ever."""

NUMBERS = frozenset(
    {
        "timeout",
        "max.retries",
        "retries.wait.ms",
        "retries.max.wait.ms",
        "cache.capacity",
        "cache.latest.ttl.sec",
    }
)
"""The client's settings that are numbers; the environment has text."""

REFUSED = frozenset({409, 42201})
"""What a registry says of a schema that it will never take as it is: incompatible, invalid."""

NOT_FOUND = frozenset({40401, 40402, 40403})
"""No such subject, version, schema. A 404 with another code is said of the path, by whatever answers there."""


PREFIX = "OUTBOX_REGISTRY_"
NO_SETTINGS = frozenset({"OUTBOX_REGISTRY_AUTO_REGISTER", "OUTBOX_REGISTRY_SUBJECT_STRATEGY"})
"""Of the relay, not of the client."""


WORDS = 1_000
"""Most characters of an answer that an error holds: it may be a whole page."""


def settings_from(environ: Mapping[str, str]) -> dict[str, str]:
    """The client's settings of an environment: `a.b` is OUTBOX_REGISTRY_A_B, or the content of the file that
    OUTBOX_REGISTRY_A_B_FILE names; as it is for the relay.

    Raises UsageError where both are set, or the file cannot be read.
    """
    settings = {}
    for name, text in environ.items():
        plain = name.removesuffix("_FILE")
        if not name.startswith(PREFIX) or plain in NO_SETTINGS:
            continue
        if plain != name:
            if plain in environ:
                raise UsageError(f"{plain} and {name} are both set: remove one")
            text = _content(name, text)
        settings[plain.removeprefix(PREFIX).lower().replace("_", ".")] = text
    return settings


def _content(name: str, path: str) -> str:
    try:
        return Path(path).read_text("utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} names {path}, which cannot be read: {error}") from error


class SchemaRegistry:
    """A registry. Thread-safe.

    Raises (every method): SchemaRefused, with the registry's words, where asking again would bring the same answer;
    RegistryError for all else: it is away, slow, or does not let us in.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings`: Confluent's, with their own names; numbers may be text. Connects to nothing.

        Raises UsageError where the client does not take them, or the extra is not installed.
        """
        if "@" in str(settings.get("url", "")):
            raise UsageError("the registry's URL holds credentials, and URLs are shown: set basic.auth.user.info")
        try:
            with warnings.catch_warnings(record=True):  # its authlib speaks of a change that is the client's to make
                from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
        except ImportError as error:
            raise UsageError(
                f"a schema registry needs the extra: pip install 'kafka-outbox[registry]' ({error})"
            ) from None
        self._schema: Callable[[str], Any] = lambda text: Schema(text, "AVRO")
        given = {name: _number(name, value) for name, value in settings.items()}
        try:
            self._client: Any = SchemaRegistryClient({"timeout": TIMEOUT, **given})
        except (ValueError, TypeError, OSError) as error:  # OSError: a certificate that cannot be read
            raise UsageError(f"a setting of the schema registry cannot be used: {error}") from error
        # In older versions of the client that is the only name for it.
        self.close = weakref.finalize(self, self._client.__exit__)
        """Closes the connections, as the end of this object does. Not to be used afterwards."""

    def register(self, subject: str, schema: str) -> int:
        """The id of a schema (JSON text), which is a version of `subject` from then on."""
        found: int = _asked(lambda: self._client.register_schema(subject, self._schema(schema)), REFUSED)
        return found

    def look_up(self, subject: str, schema: str) -> int:
        """The id of a schema that is a version of `subject`; SchemaRefused where it is none."""
        registered = _asked(lambda: self._client.lookup_schema(subject, self._schema(schema)), NOT_FOUND | REFUSED)
        return int(registered.schema_id)

    def schema(self, schema_id: int) -> str:
        """The schema of that id, as JSON text; SchemaRefused where there is none. The client remembers it."""
        return str(_asked(lambda: self._client.get_schema(schema_id).schema_str, NOT_FOUND))

    def versions(self, subject: str) -> dict[int, str]:
        """The versions of `subject` by number, oldest first, as JSON text; empty where there is no such subject."""
        try:
            numbers = _asked(lambda: self._client.get_versions(subject), NOT_FOUND)
        except SchemaRefused:
            return {}
        return {number: self._version(subject, number) for number in sorted(numbers)}

    def _version(self, subject: str, number: int) -> str:
        schema = _asked(lambda: self._client.get_version(subject, number).schema)
        if schema.schema_type not in (None, "AVRO") or schema.references:
            raise RegistryError(f"version {number} of {subject} is no Avro schema that stands by itself")
        return str(schema.schema_str)


def _number(name: str, value: Any) -> Any:
    if name not in NUMBERS or not isinstance(value, str):
        return value
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        raise UsageError(f"the registry's setting {name} is {value!r}: it must be a number") from None


def _asked(call: Callable[[], Any], final: frozenset[int] = frozenset()) -> Any:
    """What the client's call gives, its errors turned into ours: SchemaRefused for the error codes that are `final`."""
    from confluent_kafka.schema_registry.error import SchemaRegistryError

    try:
        return call()
    except SchemaRegistryError as error:
        words = f"{str(error.error_message)[:WORDS]} (HTTP {error.http_status_code}, code {error.error_code})"
        refused = error.error_code in final
        raise (SchemaRefused if refused else RegistryError)(words) from error
    except Exception as error:  # httpx's, a token that cannot be had, an answer that is no JSON: all of it may pass
        raise RegistryError(f"{type(error).__name__}: {error}") from error
