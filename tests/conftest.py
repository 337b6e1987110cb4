"""Fixtures on real servers, the order of the tests (fast first), and the rule that nothing is skipped in CI."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import httpx
import pytest
import structlog
from hypothesis import HealthCheck, settings

from outbox.identity import HERE
from outbox.migrate import migrate
from tests.roles import grant_roles
from tests.servers import Kafka, Postgres, Registry, Server, ServerUnavailable
from tests.servers.choice import in_ci, is_forced

S = TypeVar("S", bound=Server)

# A busy machine makes a test slow, not wrong.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


class MakeDatabase(Protocol):
    """What the fixture `make_database` gives."""

    def __call__(self, lanes: int = 1) -> str:
        """URL of a new migrated database of this test, whose outbox bears the database's name and a uuid of its own."""
        ...


class MakeTopic(Protocol):
    """What the fixture `topic` gives."""

    def __call__(self, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        """Name of a new topic that no other test knows."""
        ...


@pytest.fixture(autouse=True)
def log_as_configured() -> Iterator[None]:
    """A command that a test runs in this process configures the log, for all tests after it."""
    yield
    structlog.reset_defaults()


def started(make: Callable[[], S]) -> S:
    """A started server; where this machine cannot have it, the test is skipped, or fails when a choice is forced."""
    try:
        server = make()
        server.start()
    except ServerUnavailable as error:
        if is_forced():
            raise
        pytest.skip(str(error))
    return server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL for all tests of the run, without fsync: a test that kills it starts one of its own."""
    server = started(Postgres)
    yield server
    server.close()


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """One broker for all tests of the run: a test that stops or kills it starts one of its own."""
    server = started(Kafka)
    yield server
    server.close()


@pytest.fixture(scope="session")
def registry() -> Iterator[Registry]:
    """One schema registry for all tests of the run, which asks for BACKWARD. Its subjects are the tests' own topics."""
    server = started(Registry)
    with closing(server):
        httpx.put(f"{server.url}/config", json={"compatibility": "BACKWARD"}, timeout=60).raise_for_status()
        yield server


@pytest.fixture(scope="session")
def template(postgres: Postgres) -> Callable[[int], str]:
    """Gives the name of a migrated database with that many lanes, migrated once in a run and only copied then. The
    roles of tests/roles.py have their parts in it."""
    made: dict[int, str] = {}

    def template_of(lanes: int) -> str:
        if lanes not in made:
            name = f"template_{lanes}_{uuid4().hex[:8]}"
            url = postgres.create_database(name)
            migrate(url, lanes=lanes)
            grant_roles(url)
            made[lanes] = name
        return made[lanes]

    return template_of


@pytest.fixture
def make_database(postgres: Postgres, template: Callable[[int], str]) -> Iterator[MakeDatabase]:
    """Makes databases for a test (16 ms each) and drops them after it."""
    made: list[str] = []

    def make(lanes: int = 1) -> str:
        name = f"test_{uuid4().hex[:12]}"
        url = postgres.create_database(name, template(lanes))
        made.append(name)
        # A copy has the template's identity, which two outboxes on one Kafka must not share.
        postgres.execute(f"UPDATE outbox.meta SET name = '{name}', uuid = gen_random_uuid(), home = {HERE}", name)
        return url

    yield make
    for name in made:
        postgres.drop_database(name)


@pytest.fixture
def database(make_database: MakeDatabase) -> str:
    """URL of a migrated database with one lane that belongs to this test."""
    return make_database()


@pytest.fixture
def topic(kafka: Kafka) -> MakeTopic:
    """Makes topics with unique names."""

    def make(partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        return kafka.create_topic(f"test-{uuid4().hex[:12]}", partitions, config)

    return make


LONGEST = ("test_torture", "test_relay", "test_resolve", "test_crash", "test_hazards", "test_servers", "test_model")
"""Files that take a minute or more, the longest first."""


@pytest.hookimpl(trylast=True)  # after pytest-randomly, whose order is kept within each rank
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests without a server first, those that kill something last, and at the very end the one that waits a minute.

    In one of several processes (`-n 3 --dist loadfile`), which share the files out: what takes longest is begun first.
    """
    items.sort(key=_early if hasattr(config, "workerinput") else _rank)


def _early(item: pytest.Item) -> tuple[int, bool, int]:
    place = LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)
    return place, _rank(item) == 3, -_rank(item)


def _rank(item: pytest.Item) -> int:
    if item.get_closest_marker("patient"):
        return 3
    if item.get_closest_marker("crash"):
        return 2
    return 1 if {"postgres", "kafka", "registry"} & set(getattr(item, "fixturenames", ())) else 0


class NothingSkipped:
    """Fails the run when a test or a module was skipped: in CI a skip is a hole, not a pass.

    Also in each of several processes, which tell the one that began them: it hears of no module that they skipped.
    """

    def __init__(self) -> None:
        self.skipped: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["skipped"] = list(self.skipped)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """xdist: a process has ended, in order if it has an output."""
        self.skipped.update(getattr(node, "workeroutput", {}).get("skipped", ()))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped, which CI does not allow", red=True)
            for nodeid in sorted(self.skipped):
                terminalreporter.line(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    """Refuses skips in CI."""
    if in_ci():
        config.pluginmanager.register(NothingSkipped())
