"""Earlier versions of a service's schemas: in folders, in git, in a registry; and which of them are a schema's own."""

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from outbox.errors import SchemaError, UsageError
from outbox.registry import SchemaRegistry
from outbox.schemas import Schema, full_name


@dataclass(frozen=True, slots=True)
class Version:
    """A schema as it is, or was, somewhere."""

    label: str
    schema: Schema


class Level(StrEnum):
    """What a new version promises. BACKWARD: it reads the events of the last version before it. FORWARD: that one reads
    its events. FULL: both. TRANSITIVE: the same of all versions before it.

    https://docs.confluent.io/platform/current/schema-registry/fundamentals/schema-evolution.html
    """

    BACKWARD = "BACKWARD"
    BACKWARD_TRANSITIVE = "BACKWARD_TRANSITIVE"
    FORWARD = "FORWARD"
    FORWARD_TRANSITIVE = "FORWARD_TRANSITIVE"
    FULL = "FULL"
    FULL_TRANSITIVE = "FULL_TRANSITIVE"

    @property
    def is_backward(self) -> bool:
        return not self.startswith("FORWARD")

    @property
    def is_forward(self) -> bool:
        return not self.startswith("BACKWARD")

    @property
    def is_transitive(self) -> bool:
        return self.endswith("TRANSITIVE")


def in_folders(folders: Iterable[Path]) -> list[Version]:
    """Every .avsc of these folders, in their order: the oldest first. Raises UsageError for a folder without one."""
    found = []
    for folder in folders:
        files = sorted(folder.glob("*.avsc"))
        if not files:
            raise UsageError(f"{folder}: no .avsc file here; give the folder that holds the earlier schemas")
        found += [_version(str(file), file.read_bytes()) for file in files]
    return found


def in_git(path: Path, ref: str, *, all_before: bool) -> list[Version]:
    """Every .avsc under `path` as it is in the commit `ref`; with `all_before` also as it ever was, oldest first.

    Raises UsageError with git's words: no repository, no such commit.
    """
    folder, name = (path, ".") if path.is_dir() else (path.parent, path.name)
    _git(folder, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", ref=ref)
    commits = _git(folder, "rev-list", "--reverse", ref, "--", name).decode().split() if all_before else [ref]
    found: dict[str, Version] = {}
    for commit in commits:
        for entry in os.fsdecode(_git(folder, "ls-tree", "-r", "-z", commit, "--", name)).split("\0"):
            about, _, file = entry.partition("\t")  # mode, type and blob; a blob that was seen is no other version
            if file.endswith(".avsc") and (blob := about.split()[-1]) not in found:
                label = f"{file} at {commit[:12] if all_before else ref}"
                found[blob] = _version(label, _git(folder, "cat-file", "blob", blob))
    return list(found.values())


def in_registry(registry: SchemaRegistry, subject: str) -> list[Version]:
    """The versions of a subject, oldest first; none where there is no such subject. Raises RegistryError."""
    versions = registry.versions(subject).items()
    return [_version(f"version {number} of {subject}", text.encode()) for number, text in versions]


def own(schema: Schema, versions: Iterable[Version]) -> list[Version]:
    """Those of the same record, or of the same topic."""
    return [version for version in versions if is_same(schema, version.schema)]


def is_same(schema: Schema, other: Schema) -> bool:
    """Whether one is a version of the other: a record may get another name, or another topic, not both at once."""
    return full_name(schema) == full_name(other) or schema.get("topic", "") == other.get("topic")


def _version(label: str, text: bytes) -> Version:
    try:
        schema: Any = json.loads(text)
    except ValueError as error:  # no JSON, or no UTF-8
        raise SchemaError(f"{label}: not JSON: {error}") from error
    if not isinstance(schema, dict) or "name" not in schema:
        raise SchemaError(f"{label}: no record at the top level")
    return Version(label, schema)


def _git(folder: Path, *arguments: str, ref: str = "") -> bytes:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)  # noqa: S603 -- git, without a shell
    except FileNotFoundError:
        raise UsageError("git is not installed; compare with --folder instead") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip() or f"no commit {ref!r} here; fetch it first"
        raise UsageError(f"git in {folder}: {words}")
    return done.stdout
