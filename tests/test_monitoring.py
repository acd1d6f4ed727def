"""conf/prometheus and conf/grafana: a real Prometheus loads them and scrapes a real proxy."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT
from proxy_process import ProxyProcess
from sandbox import CHAT, Sandbox, until

from xaiproxy import client_keys

CONF = ROOT / "conf" / "prometheus"
RULES = yaml.safe_load((CONF / "rules.yml").read_text())["groups"][0]["rules"]
ALERTS = {rule["alert"]: rule["expr"] for rule in RULES}
RULE_TESTS = yaml.safe_load((CONF / "rules_test.yml").read_text())["tests"]
DASHBOARD = json.loads((ROOT / "conf" / "grafana" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = {
    target["expr"]: target["legendFormat"] for panel in PANELS for target in panel["targets"]
}
KEY = "xaip_of-prometheus"
AUTHORIZATION = f"Authorization: Bearer {KEY}"
# What Grafana puts in place of its variables, for all instances.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$instance": ".*"}
SELECTOR = re.compile(r"\b(?:xaiproxy|process)_\w+(?:\{[^}]*\})?")
# Of no use beside the resident memory.
UNUSED = {"process_virtual_memory_bytes"}

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus is not installed",
)


def copy_of_conf(folder: Path) -> Path:
    """Copy conf/prometheus, and put the client key there that its example names."""
    shutil.copytree(CONF, folder / "prometheus")
    (folder / "prometheus" / "xaiproxy.key").write_text(KEY)
    return folder / "prometheus" / "prometheus.yml"


@pytest.fixture(scope="module")
def proxy(
    shared_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProxyProcess]:
    """A proxy that requires a client key, signed in, with a refresher's heartbeat."""
    folder, origin = tmp_path_factory.mktemp("monitored"), shared_sandbox.url
    (folder / "client-keys").write_text(f"prometheus {client_keys.digest(KEY)}\n")
    shared_sandbox.write_login(folder / "tokens.json")
    with ProxyProcess(folder, issuer=origin, upstream=origin) as running:
        running.refresher_lives()
        yield running


@pytest.fixture(scope="module")
def prometheus(
    proxy: ProxyProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus with the example of conf/, which scrapes the proxy each second.

    Its first scrape is five seconds after its start, so that tests share it.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    file = copy_of_conf(folder)
    text = file.read_text()
    for old, new in (
        ("127.0.0.1:9090", f"127.0.0.1:{proxy.port}"),
        ("_interval: 15s", "_interval: 1s"),
    ):
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    with Prometheus(file, folder) as running:
        yield running


class Prometheus:
    """A running Prometheus on a free port. `folder`: for its storage and its log."""

    def __init__(self, config: Path, folder: Path):
        self._log = folder / "prometheus.log"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder}/tsdb",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stderr=log,
            )
        # It listens before it is ready.
        self._address = until(lambda: self._logged(r'"Listening on" address=(\S+)'), 30)
        until(lambda: self._logged('"Server is ready(.)'), 30)

    def _logged(self, pattern: str) -> str:
        text = self._log.read_text()
        assert self.process.poll() is None, text
        found = re.search(pattern, text)
        return found[1] if found else ""

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0, self._log.read_text()

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}{path}?{urllib.parse.urlencode(parameters)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=10) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                pytest.fail(f"{parameters}: {error.read().decode()}")
        assert content["status"] == "success", content
        return content["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("/api/v1/query", query=expression)["result"]

    def wait_for(self, expression: str) -> None:
        """Wait until an expression has a result: until a scrape, that is."""
        until(lambda: self.query(expression), 20)

    def alerts(self) -> set[str]:
        """The alerts whose condition holds now, without regard to `for`.

        A busy machine delays the proxy's event loop, whatever the proxy does.
        """
        names = ALERTS.keys() - {"XaiproxyEventLoopLag"}
        return {name for name in names if self.query(ALERTS[name])}


def in_grafana(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def exposed(proxy: ProxyProcess) -> set[str]:
    """The metrics of /metrics, by the names of their families in Prometheus's own text format."""
    page = proxy.ask("GET", "/metrics", AUTHORIZATION).body.decode()
    return set(re.findall(r"^# TYPE (\S+) ", page, re.M))


def named(expression: str) -> set[str]:
    """The metrics in an expression; for a histogram its family."""
    names = {selector.partition("{")[0] for selector in SELECTOR.findall(expression)}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}


def chat(proxy: ProxyProcess, stream: bool = True) -> int:
    body = json.dumps({**CHAT, "stream": stream}).encode()
    return proxy.ask(
        "POST", "/v1/chat/completions", AUTHORIZATION, "Content-Type: application/json", body=body
    ).status


# The rules


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)


@needs_prometheus
def test_the_rules_pass_their_own_tests() -> None:
    done = promtool("test", "rules", CONF / "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_example_is_a_valid_configuration(tmp_path: Path) -> None:
    done = promtool("check", "config", "--lint-fatal", copy_of_conf(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def fires(case: dict[str, Any], alert: str) -> bool:
    return any(f'alertname="{alert}"' in sample["labels"] for sample in case["exp_samples"])


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_test_in_which_it_begins_to_fire(alert: str) -> None:
    assert any(
        not fires(before, alert) and fires(after, alert)
        for test in RULE_TESTS
        for before, after in itertools.pairwise(test["promql_expr_test"])
    )


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_has_a_severity_and_names_a_command(rule: dict[str, Any]) -> None:
    assert rule["labels"] == {"severity": rule["labels"]["severity"]}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description"}
    assert re.search(r"\b[Tt]ype `[a-z][^`]+`", rule["annotations"]["description"])


def test_the_commands_and_settings_that_they_name_exist() -> None:
    text = "".join((CONF / name).read_text() for name in ("rules.yml", "prometheus.yml"))
    commands = set(re.findall(r"`(xai-[a-z-]+)", text))
    assert commands and all(os.access(ROOT / "bin" / name, os.X_OK) for name in commands)
    options = set(re.findall(r"`xai-login (--[a-z]+)", text))
    usage = subprocess.run(
        [sys.executable, "-m", "xaiproxy.login", "--help"], capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert options and all(option in usage for option in options)
    settings = (ROOT / "conf" / "xaiproxy.env.example").read_text()
    assert all(name in settings for name in re.findall(r"XAI_PROXY_\w+", text))


# The dashboard


def test_the_dashboard_is_well_formed() -> None:
    assert (DASHBOARD["uid"], DASHBOARD["title"]) == ("xaiproxy", "xaiproxy")
    # Grafana 10.0 wrote 38.
    assert DASHBOARD["schemaVersion"] >= 38
    assert "__inputs" not in DASHBOARD
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "instance"}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["instance"]["allValue"] == ".*"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Is it well", "Traffic", "Latency", "Upstream", "Usage", "Process"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_each_panel_needs_no_plug_in_and_has_a_unit_and_a_description(
    panel: dict[str, Any],
) -> None:
    assert panel["type"] in ("stat", "gauge", "timeseries", "bargauge")
    assert panel["description"].endswith(".")
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"] and defaults["thresholds"]["steps"][0]["value"] is None
    assert panel["targets"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(refs) == len(set(refs))
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        covered = set(
            itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
        )
        assert at["x"] + at["w"] <= 24 and not cells & covered, panel["title"]
        cells |= covered


def test_the_panels_show_the_chosen_instances_only() -> None:
    for expression in EXPRESSIONS:
        for selector in SELECTOR.findall(expression):
            assert 'instance=~"$instance"' in selector


# Both, with a real Prometheus


@needs_prometheus
def test_every_expression_has_a_result_after_traffic_and_no_alert_fires(
    proxy: ProxyProcess, prometheus: Prometheus, sandbox: Sandbox
) -> None:
    assert [chat(proxy), chat(proxy, stream=False)] == [200, 200]
    assert proxy.ask("GET", "/v1/models").status == 401
    prometheus.wait_for('count_over_time(xaiproxy_requests_total{route="chat"}[1m]) >= 2')

    for expression, legend in EXPRESSIONS.items():
        result = prometheus.query(in_grafana(expression))
        # No alert fires.
        assert bool(result) != expression.startswith("ALERTS{"), expression
        labels = set(re.findall(r"{{(\w+)}}", legend))
        assert all(labels <= series["metric"].keys() for series in result), (expression, result)
    assert prometheus.alerts() == set()

    # A misspelt label value selects nothing; those of counters exist from the start.
    selectors = {selector for rule in ALERTS.values() for selector in SELECTOR.findall(rule)}
    assert {selector for selector in selectors if not prometheus.query(selector)} == {
        'xaiproxy_requests_total{route!="own",status=~"5.."}'
    }

    used = {name for expression in (*EXPRESSIONS, *ALERTS.values()) for name in named(expression)}
    assert used == exposed(proxy) - UNUSED


@needs_prometheus
def test_faults_fulfil_the_conditions_of_their_alerts(
    proxy: ProxyProcess, prometheus: Prometheus, sandbox: Sandbox
) -> None:
    """The last test: it ends the proxy."""

    def fails(**how: Any) -> int:
        sandbox.set(answers=[{"path": "/v1/chat/completions", "times": 1, **how}])
        return chat(proxy)

    # A counter with a status has no increase before its second scrape.
    assert fails(status=500) == 500
    prometheus.wait_for('xaiproxy_requests_total{status="500"}')

    assert [fails(status=500), fails(cut="reset")] == [500, 502]
    proxy.refresher_lives(False)
    sandbox.kill()
    assert chat(proxy) == 403
    prometheus.wait_for('xaiproxy_requests_total{status="403"}')
    assert prometheus.alerts() == {
        "XaiproxyServerErrors",
        "XaiproxyUpstreamErrors",
        "XaiproxyTokenRefused",
        "XaiproxyRefresherGone",
    }

    now = time.time()
    sandbox.write_login(proxy.token_path, obtained_at=now - 3600, expires_at=now + 60)
    prometheus.wait_for("xaiproxy_access_token_expiry_timestamp_seconds - time() < 60")
    assert "XaiproxyTokenExpiresSoon" in prometheus.alerts()

    proxy.token_path.unlink()
    prometheus.wait_for("xaiproxy_login_required == 1")
    assert "XaiproxySignInRequired" in prometheus.alerts()
    assert "XaiproxyTokenExpiresSoon" not in prometheus.alerts()

    proxy.terminate()
    prometheus.wait_for("up == 0")
    assert "XaiproxyDown" in prometheus.alerts()
    assert "XaiproxySignInRequired" not in prometheus.alerts()
