"""Programs out of Debian's packages, unpacked into the cache: nothing is installed, and nobody must be root."""

import re
import shutil
import subprocess
from pathlib import Path

from tests.servers import cache
from tests.servers.errors import ServerUnavailable, StartFailed

APT_SECONDS = 300.0


def program(name: str, package: str) -> Path:
    """The one on the PATH, else that of the package. ServerUnavailable where this machine cannot have it."""
    if found := shutil.which(name):
        return Path(found)
    return next(unpacked(package).rglob(f"bin/{name}"))


def unpacked(package: str, libraries: str = "(?!)") -> Path:
    """The folder with what is in a package, and in those that it depends on whose names match `libraries`."""
    if not shutil.which("apt-get"):
        raise ServerUnavailable(f"No Debian here: install what its package {package!r} has.")
    return cache.once(f"debian-{package}", lambda folder: _unpack(folder, package, libraries))


def _unpack(folder: Path, package: str, libraries: str) -> None:
    """With lists of our own, as old ones name what is there no more."""
    cache.say(f"{package}: downloading Debian's package (once) …")
    lists, archives = folder / "lists", folder / "cache"
    own = [f"-oDir::State::Lists={lists}", f"-oDir::Cache={archives}", "-oAPT::Sandbox::User="]
    (lists / "partial").mkdir(parents=True)
    (archives / "archives" / "partial").mkdir(parents=True)
    _run(folder, "apt-get", "-qq", *own, "update")
    listed = _run(folder, "apt-cache", *own, "depends", package)
    needed = re.findall(rf"^ *Depends: ({libraries})$", listed, re.MULTILINE)
    _run(folder, "apt-get", "-qq", *own, "download", package, *needed)
    for archive in folder.glob("*.deb"):
        _run(folder, "dpkg", "-x", str(archive), str(folder / "root"))
        archive.unlink()
    shutil.rmtree(lists)
    shutil.rmtree(archives)


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=APT_SECONDS)
    if done.returncode:
        raise StartFailed(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
