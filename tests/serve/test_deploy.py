"""The files of deploy/ name what exists: metrics, labels, options, ports; and their times fit together."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from classer.serve.gateway.run import GatewayConfig
from classer.serve.ops.metrics import CallMetrics, DeviceMetrics, Stages, new_registry
from classer.serve.rpc.server import ServeConfig
from classer.tools.cli.environment import variable

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
# Labels that Prometheus itself gives.
SCRAPED = {"job", "instance"}


class Ran(NamedTuple):
    bucket: int = 32
    rows: int = 8
    texts: int = 6
    tokens: int = 100
    seconds: float = 0.01


def samples() -> dict[str, set[str]]:
    """The labels of every sample of a server that has answered a call and run a batch."""
    registry = new_registry()
    calls = CallMetrics(registry)
    calls.ended("Classify", "RESOURCE_EXHAUSTED", 0.1, "OVERLOADED", "team", {"OK": 1}, {"OVERLOADED": 1})
    calls.staged(0.1, Stages(0.01, 0.01))
    DeviceMetrics(registry, waiting_tokens=lambda: 3, max_waiting_tokens=10, alive=lambda: True).ran(Ran())
    return {sample.name: set(sample.labels) for family in registry.collect() for sample in family.samples}


def unknown_in(query: str, known: dict[str, set[str]]) -> list[str]:
    """What a PromQL query names that there is not: metrics, and labels that no metric of it has."""
    names = re.findall(r"\b(?:classer|process|python)_\w+", query)
    missing = [name for name in names if name not in known]
    labels = SCRAPED.union(*(known.get(name, set()) for name in names))
    used = re.findall(r"\bby \(([^)]*)\)", query) + re.findall(r"\{(\w+)=", query)
    return missing + [label for group in used for label in re.split(r",\s*", group) if label not in labels]


def test_the_dashboard_s_queries_name_what_is_measured() -> None:
    known = samples()
    dashboard = json.loads((DEPLOY / "grafana" / "classer.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    assert len(queries) > 14
    for query in queries:
        assert unknown_in(query, known) == [], query
    assert unknown_in("sum by (cod) (rate(classer_textes_total[1m]))", known) == ["classer_textes_total", "cod"]
    # … and everything of ours that is measured is shown.
    shown = {name for query in queries for name in re.findall(r"\bclasser_\w+", query)}
    ours = {name for name in known if name.startswith("classer_")}
    assert {name for name in ours if not name.endswith(("_created", "_sum", "_count"))} <= shown


def manifests() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / "classer.yaml").read_text()))


def test_the_manifests_set_options_that_exist_and_ports_that_fit() -> None:
    deployment = next(one for one in manifests() if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    server, gateway = pod["containers"]
    for container, config in ((server, ServeConfig), (gateway, GatewayConfig)):
        options = {variable(field.name) for field in dataclasses.fields(config)}
        assert {one["name"] for one in container["env"]} <= options
    of_server = {one["name"]: one["value"] for one in server["env"]}
    of_gateway = {one["name"]: one["value"] for one in gateway["env"]}
    ports = {one["name"]: str(one["containerPort"]) for one in server["ports"] + gateway["ports"]}
    assert ports == {
        "grpc": of_server["CLASSER_PORT"],
        "metrics": of_server["CLASSER_METRICS_PORT"],
        "http": of_gateway["CLASSER_PORT"],
    }
    assert of_gateway["CLASSER_SERVER"] == f"localhost:{ports['grpc']}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert str(server[probe]["grpc"]["port"]) == ports["grpc"]
    for one in manifests():
        if one["kind"] == "Service":
            assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports.keys()
            assert one["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_a_pod_has_the_time_to_drain_and_runs_without_rights() -> None:
    pod = next(one for one in manifests() if one["kind"] == "Deployment")["spec"]["template"]["spec"]
    for container in pod["containers"]:
        before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        drain = next(float(one["value"]) for one in container["env"] if one["name"] == "CLASSER_DRAIN_SECONDS")
        assert pod["terminationGracePeriodSeconds"] >= before + drain + 5
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["enableServiceLinks"] is False  # else a Service's CLASSER_PORT is taken for an option


def test_the_image_is_made_of_what_is_there_and_does_not_run_as_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert all(user.split(":")[0] not in ("root", "0") for user in users)
    # One check would call the gateway, or a server with TLS, sick for ever.
    assert not any(line.startswith("HEALTHCHECK") for line in lines)
    options = {variable(field.name) for field in dataclasses.fields(ServeConfig)}
    assert set(re.findall(r"\bCLASSER_[A-Z_]+", "\n".join(lines))) <= options
    kept = [line[1:] for line in (DEPLOY.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((DEPLOY.parent / name).exists() for name in kept)
    packages = re.search(r"packages = \[(.*?)\]", (DEPLOY.parent / "pyproject.toml").read_text(), re.DOTALL)
    assert packages is not None
    rooms = set(re.findall(r'"classer\.(\w+)', packages[1]))
    assert "serve" in rooms
    assert rooms <= set(kept)
