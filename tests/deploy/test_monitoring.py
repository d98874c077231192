"""The dashboard and the alerts ask for metrics that a run exports."""

import json
import re
from pathlib import Path

import pytest
import yaml
from ray.util import metrics

from vcf_batch.pool.prometheus import PrometheusExporter

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\bray_(vcf_batch_\w+)")
KINDS = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_count", "_sum"]}
"""What Prometheus appends to the name of a metric, by its kind."""


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Each series that a run exports, with its labels."""
    found: dict[str, set[str]] = {}

    def kind(own: str) -> type:
        class Recorded:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], **how: object) -> None:
                for end in KINDS[own]:
                    found[name + end] = {*tag_keys, "le"}

            def set_default_tags(self, tags: object) -> None:
                """Nothing."""

            def set(self, value: float) -> None:
                """Nothing."""

        return Recorded

    for name in KINDS:
        monkeypatch.setattr(metrics, name, kind(name))
    PrometheusExporter("out", 1)
    return found


def expressions() -> dict[str, str]:
    """Every query of the dashboard and of the alerts, by where it stands."""
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    found = {panel["title"]: target["expr"] for panel in board["panels"] for target in panel["targets"]}
    found |= {each["name"]: each["query"] for each in board["templating"]["list"] if each["type"] == "query"}
    groups = yaml.safe_load((ROOT / "deploy/alerts.yaml").read_text())["groups"]
    return found | {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_every_metric_that_is_asked_for_is_exported(exported: dict[str, set[str]]) -> None:
    asked = {name: {*NAME.findall(text)} for name, text in expressions().items()}
    assert all(asked.values())
    assert set().union(*asked.values()) <= exported.keys()


def test_every_label_that_is_asked_for_exists(exported: dict[str, set[str]]) -> None:
    for text in expressions().values():
        known = set.intersection(*(exported[name] for name in NAME.findall(text)))
        grouped = re.findall(r"by \(([^)]*)\)", text)
        assert {label for labels in grouped for label in re.split(r",\s*", labels)} <= known | {"output"}
        for name, chosen in re.findall(r"ray_(\w+)\{([^}]*)\}", text):
            assert {*re.findall(r"(\w+)=~?\"", chosen)} <= exported[name]


def test_every_panel_and_alert_says_what_it_shows() -> None:
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    assert all(panel["description"].endswith(".") for panel in board["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len({*places}) == len(places)
    groups = yaml.safe_load((ROOT / "deploy/alerts.yaml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")
        assert rule["labels"]["severity"] in ("warning", "critical")
