"""What is in deploy/, as far as it can be shown without a Docker engine, a cluster or an init system: it is parsed,
held against schemas, rendered and linted, and every setting, path, port and metric in it is one that the relay has."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import promql_parser
import pytest
import trustme
import yaml
from prometheus_client.parser import text_string_to_metric_families

from outbox.__main__ import main as outbox_command
from relay.__main__ import main as relay_command
from relay.config import load
from relay.metrics import ENDS
from relay.monitor import LaneState, Monitor
from relay.status import ANY_ADDRESS
from relay.tracing import CLOSE_SECONDS
from relay.transaction import check_settings
from relay.views import Backlog, Waiting
from tests.relay_process import ROOT
from tests.servers import ServerUnavailable
from tests.servers.choice import is_forced
from tests.servers.debian import program

DEPLOY = ROOT / "deploy"
IMAGE = f"kafka-outbox:{version('kafka-outbox')}"
KUBERNETES = ("1.29", "1.37")
"""The first one with native sidecars, and one of today."""

RELEASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {
        "image": {"tag": "1.2.3"},
        "imagePullSecrets": [{"name": "registry"}],
        "replicas": 3,
        "settings": {"OUTBOX_LEASE": "5", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"},
        "secret": {"files": {"OUTBOX_KAFKA_SASL_PASSWORD": "kafka-password"}},
        "port": 9000,
        "drainTimeout": 45,
        "podAnnotations": {"team": "shop"},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    },
    "one": {"replicas": 1},
}
"""Values for the chart."""


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@cache
def manifests() -> dict[str, list[dict[str, Any]]]:
    """The objects for Kubernetes by where they come from."""
    found = {path.stem: documents(path) for path in (DEPLOY / "kubernetes").glob("*.yaml")}
    return found | {f"helm-{name}": rendered(values) for name, values in RELEASES.items()}


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What Helm makes of the chart, its notes left out."""
    with helm_python.Chart.load(DEPLOY / "helm") as chart:
        files = chart.render(values, name="shop-relay", namespace="shop")
    return [
        one for name, text in sorted(files.items()) if name.endswith(".yaml") for one in yaml.safe_load_all(text) if one
    ]


# ---- every place in which a relay is set up --------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A relay as one of the files runs it."""

    settings: dict[str, str]
    grace: float
    """Seconds from SIGTERM to SIGKILL."""
    command: list[str]
    probes: dict[str, tuple[str, int]]
    """Path and port that are asked for."""
    asked_from_outside: bool


def in_kubernetes(source: str) -> Place:
    objects = {one["kind"]: one for one in manifests()[source]}
    template = objects["Deployment"]["spec"]["template"]
    pod, annotations = template["spec"], template["metadata"]["annotations"]
    [container] = containers(pod)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = {name: container[name]["httpGet"] for name in ("livenessProbe", "readinessProbe")}
    asked = {name: (probe["path"], ports[probe["port"]]) for name, probe in probes.items()}
    asked["prometheus"] = annotations["prometheus.io/path"], int(annotations["prometheus.io/port"])
    if policy := objects.get("NetworkPolicy"):
        asked["allowed"] = "/metrics", policy["spec"]["ingress"][0]["ports"][0]["port"]
    return Place(
        {one["name"]: one["value"] for one in container["env"]},
        pod["terminationGracePeriodSeconds"] - SERVICE_SECONDS.get(source, 0),
        container["args"],
        asked,
        asked_from_outside=True,
    )


SERVICE_SECONDS = {"sidecar": 30}
"""Of the grace period, what the service may use up before its sidecar is told to stop."""


def in_compose() -> Place:
    [compose] = documents(DEPLOY / "compose.yaml")
    relay = compose["services"]["relay"]
    [port] = relay["ports"]
    [url] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", relay["healthcheck"]["test"][-1])
    return Place(
        relay["environment"],
        float(relay["stop_grace_period"].removesuffix("s")),
        ["relay", "run"],
        {"published": ("/metrics", int(port.split(":")[-1])), "healthcheck": (url[1], int(url[0]))},
        asked_from_outside=True,
    )


def in_systemd() -> Place:
    unit = Unit(DEPLOY / "systemd" / "outbox-relay.service")
    lines = [*(DEPLOY / "systemd" / "outbox-relay.env").read_text().splitlines(), *unit.all("Service", "Environment")]
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    [start], [stop] = unit.all("Service", "ExecStart"), unit.all("Service", "TimeoutStopSec")
    path, *arguments = shlex.split(start)
    return Place(settings, float(stop), [Path(path).name, *arguments], {}, asked_from_outside=False)


class Unit:
    """A unit of systemd: options may be given several times."""

    def __init__(self, path: Path) -> None:
        self._options: dict[tuple[str, str], list[str]] = {}
        section = ""
        for line in path.read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif line and not line.startswith("#"):
                name, _, value = line.partition("=")
                self._options.setdefault((section, name), []).append(value)

    def all(self, section: str, name: str) -> list[str]:
        return self._options.get((section, name), [])


def place(name: str) -> Place:
    return {"compose": in_compose, "systemd": in_systemd}.get(name, lambda: in_kubernetes(name))()


PLACES = ["compose", "systemd", "relay", "sidecar", *(f"helm-{name}" for name in RELEASES)]


@pytest.fixture(scope="module")
def authority() -> bytes:
    return trustme.CA().cert_pem.bytes()


@pytest.fixture
def secrets(tmp_path: Path, authority: bytes) -> Path:
    """The files of the example's Secret, with certificates that are some."""
    for name, text in example_secrets()["outbox-relay"].items():
        (tmp_path / name).write_text(text.replace(MOUNTED, str(tmp_path)))
        if name.endswith(".crt"):
            (tmp_path / name).write_bytes(authority)
    return tmp_path


@pytest.mark.parametrize("name", PLACES)
def test_its_settings_are_a_relay_s_and_give_it_time_to_drain(name: str, secrets: Path) -> None:
    """Those of Kafka's client are asked of the client itself."""
    place_ = place(name)
    config = load({k: v.replace(MOUNTED, str(secrets)).replace("%d", str(secrets)) for k, v in place_.settings.items()})
    check_settings(config)
    assert config.database()[0].startswith("postgresql://")
    assert place_.grace >= config.drain_timeout + CLOSE_SECONDS + 5
    assert place_.command == ["relay", "run"]
    assert place_.command[1] in relay_command.commands


@pytest.mark.parametrize("name", PLACES)
def test_it_is_asked_where_it_answers(name: str, pages: set[str]) -> None:
    place_ = place(name)
    host, _, port = place_.settings["OUTBOX_HTTP"].rpartition(":")
    assert (host in ANY_ADDRESS) is place_.asked_from_outside
    for path, asked in place_.probes.values():
        assert path in pages
        assert asked == int(port)


@pytest.fixture
async def pages() -> set[str]:
    return set(monitor().routes())


def test_a_sidecar_s_readiness_does_not_depend_on_kafka_and_a_deployment_s_does() -> None:
    needs = {name: place(name).settings.get("OUTBOX_READY_NEEDS_KAFKA") for name in PLACES}
    assert [name for name, value in needs.items() if value != "true"] == ["sidecar"]
    assert needs["sidecar"] is None
    [shop] = manifests()["sidecar"]
    [sidecar] = shop["spec"]["template"]["spec"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    assert "startupProbe" not in sidecar, "the service would wait for the relay"


# ---- Kubernetes and Helm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_manifests_are_what_kubernetes_knows(kubernetes: str) -> None:
    assert len(manifests()) == 4 + len(RELEASES)
    for source, objects in manifests().items():
        for one in objects:
            try:
                kubernetes_validate.validate(one, kubernetes, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(f"{source}, {one['kind']}: {error}")


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that run our image."""
    everything = [*pod.get("initContainers", []), *pod["containers"]]
    return [one for one in everything if one["image"].startswith("kafka-outbox:")]


def pods() -> dict[str, dict[str, Any]]:
    return {
        source: one["spec"]["template"]["spec"]
        for source, objects in manifests().items()
        for one in objects
        if one["kind"] in ("Deployment", "Job")
    }


def test_ours_are_not_root_may_do_nothing_and_write_nowhere() -> None:
    assert len(pods()) == 3 + len(RELEASES)
    for pod in pods().values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["enableServiceLinks"] is False, "a Service named outbox-… would be a setting that is not known"
        [container] = containers(pod)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def test_selectors_select_the_pods() -> None:
    for source, objects in manifests().items():
        [*labels] = [one["spec"]["template"]["metadata"]["labels"] for one in objects if one["kind"] == "Deployment"]
        for one in objects:
            spec = one.get("spec", {})
            if selector := spec.get("selector") or spec.get("podSelector"):
                assert selector["matchLabels"].items() <= labels[0].items(), source
    kinds = {source: [one["kind"] for one in objects] for source, objects in manifests().items()}
    assert kinds["relay"] == ["ServiceAccount", "Deployment", "PodDisruptionBudget", "NetworkPolicy"]
    assert "PodDisruptionBudget" in kinds["helm-defaults"]
    assert "PodDisruptionBudget" not in kinds["helm-one"], "it would forbid nothing, or every drain"


MOUNTED = "/run/secrets/outbox"


def example_secrets() -> dict[str, dict[str, str]]:
    return {one["metadata"]["name"]: one["stringData"] for one in manifests()["secret"]}


@pytest.mark.parametrize("source", ["relay", "sidecar"])
def test_secrets_are_read_from_files_of_a_secret_that_the_example_has(source: str) -> None:
    [container] = containers(pods()[source])
    [mount] = container["volumeMounts"]
    [volume] = [one for one in pods()[source]["volumes"] if one["name"] == mount["name"]]
    secret = example_secrets()[volume["secret"]["secretName"]]
    settings = {one["name"]: one["value"] for one in container["env"]}
    assert mount == {"name": mount["name"], "mountPath": MOUNTED, "readOnly": True}
    files = re.findall(rf"{MOUNTED}/([\w.-]+)", "\n".join([*settings.values(), *secret.values()]))
    assert {*files} == secret.keys()
    assert {name for name in settings if name.endswith("_FILE")} == {
        "OUTBOX_DATABASE_URL_FILE",
        "OUTBOX_KAFKA_SASL_PASSWORD_FILE",
    }
    assert "sslmode=verify-full" in secret["database-url"]


def test_the_job_that_migrates_is_told_the_database_as_the_command_asks_for_it() -> None:
    [migrate] = containers(pods()["migrate"])
    [variable] = migrate["env"]
    reference = variable["valueFrom"]["secretKeyRef"]
    assert reference["key"] in example_secrets()[reference["name"]]
    assert variable["name"] in {parameter.envvar for parameter in outbox_command.commands["migrate"].params}
    assert migrate["args"] == ["outbox", "migrate"]


@pytest.mark.parametrize("values", RELEASES.values(), ids=RELEASES)
def test_helm_has_nothing_against_the_chart(values: dict[str, Any]) -> None:
    report = helm_python.lint(DEPLOY / "helm", values)
    assert [message for message in report["messages"] if "icon" not in str(message)] == []


def test_the_chart_s_values_reach_the_relay() -> None:
    settings = place("helm-all").settings
    assert settings["OUTBOX_LEASE"] == "5"
    assert settings["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:4318"
    assert settings["OUTBOX_KAFKA_SASL_PASSWORD_FILE"] == "/run/secrets/outbox/kafka-password"
    assert settings["OUTBOX_DATABASE_URL_FILE"] == "/run/secrets/outbox/database-url"
    assert settings["OUTBOX_HTTP"] == "0.0.0.0:9000"
    assert settings["OUTBOX_DRAIN_TIMEOUT"] == "45"
    pod = pods()["helm-all"]
    assert pod["terminationGracePeriodSeconds"] == 55
    assert pod["containers"][0]["image"] == "kafka-outbox:1.2.3"
    assert pod["nodeSelector"] == {"disk": "ssd"}
    assert pod["tolerations"] == [{"key": "dedicated", "operator": "Exists"}]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    [deployment] = [one for one in manifests()["helm-all"] if one["kind"] == "Deployment"]
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["template"]["metadata"]["annotations"]["team"] == "shop"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replica": 3}, "replica"),
        ({"settings": {"OUTBOX_LEASE": 5}}, "OUTBOX_LEASE"),
        ({"settings": {"OUTBOX_HTTP": ":1"}}, "settings"),
        ({"settings": {"PGPASSWORD": "x"}}, "PGPASSWORD"),
        ({"secret": {"name": ""}}, "name"),
        ({"drainTimeout": "20s"}, "drainTimeout"),
    ],
)
def test_the_chart_refuses_values_that_it_does_not_understand(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        rendered(values)


# ---- Docker and systemd ----------------------------------------------------------------------------------------------


def test_compose_is_what_docker_knows() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, DEPLOY / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_s_name_is_this_version_s_everywhere() -> None:
    [compose] = documents(DEPLOY / "compose.yaml")
    images = {compose["services"][name]["image"] for name in ("relay", "migrate")}
    images |= {containers(pod)[0]["image"] for source, pod in pods().items() if source != "helm-all"}
    assert images == {IMAGE}
    assert IMAGE in (DEPLOY / "Dockerfile").read_text()
    assert IMAGE in (DEPLOY / "README.md").read_text()


def test_the_dockerfile_is_sound_and_what_it_installs_exists() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    text = (DEPLOY / "Dockerfile").read_text()
    [extras] = re.findall(r"'\.\[([\w,]+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= known.keys()
    assert json.loads(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[0]) == ["relay", "run"]
    assert text.rindex("USER 65532:65532") > text.rindex("FROM ")


def test_the_build_sees_what_the_wheel_is_made_of_and_nothing_else() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    wanted = {line.removeprefix("!") for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wanted == {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *wheel["packages"],
        *wheel["force-include"],
    }
    assert "*" in lines


def test_the_unit_is_hardened_and_ends_as_the_relay_does(tmp_path: Path) -> None:
    path = DEPLOY / "systemd" / "outbox-relay.service"
    unit = Unit(path)
    assert unit.all("Service", "KillSignal") == ["SIGTERM"]
    assert unit.all("Service", "RestartPreventExitStatus") == ["2"], "the settings are wrong"
    assert unit.all("Service", "DynamicUser") == unit.all("Service", "NoNewPrivileges") == ["yes"]
    assert unit.all("Service", "ProtectSystem") == ["strict"]
    [credential] = unit.all("Service", "LoadCredential")
    assert f"OUTBOX_DATABASE_URL_FILE=%d/{credential.split(':')[0]}" in unit.all("Service", "Environment")
    if (analyze := shutil.which("systemd-analyze")) is None:  # not on every machine: the above holds without
        return
    text = (
        path.read_text()
        .replace("/opt/outbox/bin/relay", sys.executable)
        .replace("EnvironmentFile=", "EnvironmentFile=-")
    )
    copy = tmp_path / path.name
    copy.write_text(text)
    done = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- Prometheus and Grafana ------------------------------------------------------------------------------------------


def monitor() -> Monitor:
    """One that has something to say of everything."""
    config = load({"OUTBOX_DATABASE_URL": "postgresql://h/d", "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "k:1"})
    watched = Monitor(config, "1", lambda: [LaneState(0, taken=True, batch=1, floor=1)])
    watched.outbox = "shop"
    watched.metrics.batch([(1, "id", "t", "orders", "k", b"v", None, None, 0)], 0.1)

    async def measured() -> Backlog:
        return Backlog((Waiting(0, 1, True, 1.0, None),), 0, 0.0)

    watched.measure = measured  # type: ignore[method-assign]
    return watched


@pytest.fixture
async def metrics() -> dict[str, set[str]]:
    """The labels of each metric that a relay has; Prometheus adds job and instance."""
    answer = await monitor()._metrics()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    return found


RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
GRAFANA = {"$__rate_interval": "5m", "$outbox": "shop"}
"""Grafana's variables in expressions, and what could stand for them."""


def in_dashboard() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in GRAFANA.items():
                expression = expression.replace(name, value)
            yield expression


def selectors(expression: str) -> list[tuple[str, set[str]]]:
    """The metrics that an expression names, and the labels that it matches."""
    found = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name is not None:
            found.append((node.name, {matcher.name for matcher in node.matchers.matchers}))

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.mark.parametrize("expressions", [[rule["expr"] for rule in RULES], [*in_dashboard()]], ids=["rules", "grafana"])
def test_every_metric_that_is_asked_for_is_one_of_the_relay_s(
    expressions: list[str], metrics: dict[str, set[str]]
) -> None:
    recorded = {rule["record"]: {"outbox"} for rule in RULES if "record" in rule}
    asked = 0
    for expression in expressions:
        for name, labels in selectors(expression):
            asked += 1
            assert labels <= (metrics | recorded)[name], expression
    assert asked >= len(expressions)


def test_every_reason_that_is_asked_for_is_one_of_the_relay_s() -> None:
    for reasons in re.findall(r'reason=~"([\w|]+)"', json.dumps(RULES).replace("\\", "")):
        assert set(reasons.split("|")) <= set(ENDS)


def test_the_alerts_pass_their_tests() -> None:
    try:
        promtool = program("promtool", "prometheus")
    except ServerUnavailable as error:
        if is_forced():
            raise
        pytest.skip(str(error))
    for arguments in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(
            [promtool, *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_what_to_do_and_has_tests_for_and_against_it(name: str) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert f"\n| `{name}` | " in page
    annotations = ALERTS[name]["annotations"]
    [section] = re.findall(r'^docs/operations\.md, "(.+)"$', annotations["runbook"])
    assert f"\n## {section}\n" in page
    assert ALERTS[name]["labels"]["severity"] in ("critical", "warning")
    [tests] = documents(DEPLOY / "prometheus" / "alerts_test.yaml")
    fires = {
        bool(one.get("exp_alerts"))
        for test in tests["tests"]
        for one in test["alert_rule_test"]
        if one["alertname"] == name
    }
    assert fires == {True, False}


def test_no_alert_is_in_the_page_that_is_not_there() -> None:
    assert set(re.findall(r"\n\| `(Outbox\w+)` \| ", (ROOT / "docs" / "operations.md").read_text())) == ALERTS.keys()


def test_the_dashboard_s_panels_lie_side_by_side_and_ask_the_chosen_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        assert panel["description"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "outbox"]
