"""deploy/grafana.json and deploy/alerts.yaml: every metric in them is one that we export."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana.json").read_text())
RULES = yaml.safe_load((ROOT / "deploy" / "alerts.yaml").read_text())["groups"][0]["rules"]
EXPORTED = {
    f"{name}_total" if metric.kind == "counter" else name: metric.labels
    for name, metric in METRICS.items()
}
EXPRESSIONS = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
EXPRESSIONS += [rule["expr"] for rule in RULES]
EXPRESSIONS += [v["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metrics_and_labels_of_an_expression_exist(expression: str) -> None:
    names = re.findall(r'__name__=~"\(ray_\)\?(\w+)"', expression)
    assert names
    assert set(re.findall(r"refinery_\w+", expression)) == set(names)
    assert set(names) <= EXPORTED.keys()
    labels = {"run"}.union(*(EXPORTED[name] for name in names))
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    assert {label.strip() for group in grouped for label in group.split(",")} <= labels
    assert set(re.findall(r"[{,](\w+)=~?\"", expression)) - {"__name__"} <= labels
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


def test_every_metric_is_shown() -> None:
    shown = {name for e in EXPRESSIONS for name in re.findall(r"refinery_\w+", e)}
    assert shown == EXPORTED.keys()


def test_panels_do_not_overlap() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        columns, lines = range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        return {(x, y) for x in columns for y in lines}

    taken = [cells(panel) for panel in DASHBOARD["panels"]]
    assert sum(map(len, taken)) == len(set.union(*taken))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_every_alert_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in {"page", "ticket", "info"}
        assert {"summary", "action"} == rule["annotations"].keys()
    headings = (ROOT / "docs" / "operations.md").read_text()
    assert "## Quarantined shards" in headings  # an alert names it
