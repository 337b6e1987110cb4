"""What a figure depends on (machine, versions), and what it costs (CPU seconds, peak memory)."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import confluent_kafka
import psutil

PACKAGES = ("kafka-outbox", "confluent-kafka", "asyncpg", "psycopg", "SQLAlchemy", "fastavro", "uvloop")


def cpu_seconds(pid: int | None) -> float | None:
    """User and system time of a process and of all its children, those that ended too. None: it cannot be read."""
    if pid is None:
        return None
    try:
        root = psutil.Process(pid)
        return sum(_seconds(process) for process in [root, *root.children(recursive=True)])
    except psutil.NoSuchProcess:
        return None


def _seconds(process: psutil.Process) -> float:
    """A process that ends meanwhile counts in its parent's children_… from then on."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    reaped = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return float(times.user + times.system + reaped)


def threads(pid: int | None) -> list[tuple[int, str, float]]:
    """Number, name and CPU seconds of each thread of a process. None: it cannot be read, or this is no Linux."""
    folders = Path(f"/proc/{pid}/task").glob("*") if pid is not None else ()
    tick = os.sysconf("SC_CLK_TCK")
    found = []
    for folder in folders:
        try:
            name, text = (folder / "comm").read_text().strip(), (folder / "stat").read_text()
        except OSError:  # it ended
            continue
        user, system = text.rpartition(")")[2].split()[11:13]
        found.append((int(folder.name), name, (int(user) + int(system)) / tick))
    return found


def readings(pids: Mapping[str, int | None]) -> dict[str, float | None]:
    """`cpu_seconds` of several processes by their names."""
    return {name: cpu_seconds(pid) for name, pid in pids.items()}


def peak_mb(pid: int) -> float | None:
    """The largest resident memory that the process ever had (VmHWM), in MB of a million bytes. None: not on Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return round(int(found[0]) * 1024 / 1e6, 1) if found else None


def description() -> dict[str, Any]:
    """Host, versions of what runs in Python, commit and time. `load` shows whether the machine was quiet."""
    return {
        "host": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": f"{platform.system()} {platform.release()}",
            "load": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "librdkafka": confluent_kafka.libversion()[0],
            **{name.lower(): found for name in PACKAGES if (found := _version(name))},
        },
        "commit": _commit(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit, with a + where the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None
