"""conf/kubernetes/shared: what is rendered is valid, and keeps the login and the streams.

Each assertion has its reason. No API server is asked; bin/kubernetes-check runs the pods.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT
from manifests import FIELDS, RELEASES, rendered, settings, validate

from xaiproxy.refresher import published_secret
from xaiproxy.setting_types import SecretName

pytest.importorskip("kubernetes_validate")

Object = dict[str, Any]

SHARED = ROOT / "conf/kubernetes/shared"
COMPONENTS = ("seed", "servicemonitor", "prometheusrule")
OPERATOR = "monitoring.coreos.com/v1"
NAMESPACE = FIELDS["metadata.namespace"]
# Seconds from a change of a Secret until a kubelet has renewed its mount: its period of a minute,
# half a minute of jitter, and some.
MOUNTED_WITHIN = 100
# Seconds for a refresh in progress and the disk.
REFRESH = 60
# Bytes: an idle process; responses whose usage is counted; a stream over TLS (docs/performance.md).
IDLE, USAGE, STREAM = 45_000_000, 64 << 20, 65 << 10
# An API server's ClusterIP and endpoints, and a cloud's metadata.
INTERNAL = ("10.96.0.1", "172.18.0.2", "192.168.1.10", "100.64.0.1", "169.254.169.254", "fd00::1")
XAI = ("104.18.18.80", "2606:4700::6812:1250")


@pytest.fixture(scope="module")
def base() -> list[Object]:
    return rendered(SHARED)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """What an overlay with a namespace and all components applies."""
    folder = tmp_path_factory.mktemp("kubernetes")
    shutil.copytree(SHARED, folder / "shared")
    (folder / "overlay").mkdir()
    (folder / "overlay/kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"namespace: {NAMESPACE}\nresources: [../shared]\n"
        f"components: [{', '.join(f'../shared/{name}' for name in COMPONENTS)}]\n"
    )
    return rendered(folder / "overlay")


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = (
        each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )
    return found


@pytest.fixture
def stateful_set(objects: list[Object]) -> Object:
    return named(objects, "StatefulSet", "xaiproxy-refresher")


@pytest.fixture
def deployment(objects: list[Object]) -> Object:
    return named(objects, "Deployment", "xaiproxy")


@pytest.fixture
def refresher_pod(stateful_set: Object) -> Object:
    return stateful_set["spec"]["template"]["spec"]


@pytest.fixture
def proxy_pod(deployment: Object) -> Object:
    return deployment["spec"]["template"]["spec"]


@pytest.fixture
def refresher(refresher_pod: Object) -> Object:
    (found,) = refresher_pod["containers"]
    return found


@pytest.fixture
def proxy(proxy_pod: Object) -> Object:
    (found,) = proxy_pod["containers"]
    return found


def mounts(container: Object) -> dict[str, Object]:
    return {each["mountPath"]: each for each in container["volumeMounts"]}


def volume(pod: Object, name: str) -> Object:
    (found,) = (each for each in pod["volumes"] if each["name"] == name)
    return found


def published(refresher: Object) -> SecretName:
    found = settings(refresher).publish
    assert isinstance(found, SecretName)
    return found


# What is valid


@pytest.mark.parametrize("release", RELEASES)
def test_no_field_is_unknown(
    base: list[Object], objects: list[Object], release: str, tmp_path: Path
) -> None:
    known = [each for each in objects if each["apiVersion"] != OPERATOR]
    validate([*base, *known], release, tmp_path)


def test_it_applies_without_the_prometheus_operator(base: list[Object]) -> None:
    """Its kinds are unknown to a cluster without it, and nothing would be applied."""
    assert OPERATOR not in {each["apiVersion"] for each in base}


def test_everything_is_in_the_namespace_of_the_overlay(objects: list[Object]) -> None:
    assert {each["metadata"]["namespace"] for each in objects} == {NAMESPACE}


# The login


def test_there_is_one_refresher_at_a_time(objects: list[Object], stateful_set: Object) -> None:
    """Two would need the volume twice, and stop one another by their claims."""
    spec = stateful_set["spec"]
    assert spec["replicas"] == 1
    assert spec.get("updateStrategy", {}).get("type", "RollingUpdate") == "RollingUpdate"
    (claim,) = spec["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    for each in objects:
        if each["kind"] == "HorizontalPodAutoscaler":
            assert each["spec"]["scaleTargetRef"]["kind"] == "Deployment"


def test_the_login_is_on_a_volume_that_outlives_the_pod(
    stateful_set: Object, refresher_pod: Object, refresher: Object
) -> None:
    """An emptyDir would lose it with its first pod; a Secret is read-only."""
    (claim,) = stateful_set["spec"]["volumeClaimTemplates"]
    mounted = mounts(refresher)["/data"]
    assert mounted["name"] == claim["metadata"]["name"]
    # A volume of the pod would hide the claim of the same name.
    assert mounted["name"] not in {each["name"] for each in refresher_pod["volumes"]}
    # A file that is mounted by subPath cannot be replaced by rename.
    assert "subPath" not in mounted and not mounted.get("readOnly")
    # fsGroup gives the root of the volume mode 2775: the folder of the login is another one.
    assert settings(refresher).token_path == Path("/data/login/tokens.json")
    # Deleted with its StatefulSet, the volume would end the login.
    policy = stateful_set["spec"].get("persistentVolumeClaimRetentionPolicy", {})
    assert set(policy.values()) <= {"Retain"}


def test_an_update_starts_before_a_sign_in(refresher_pod: Object, refresher: Object) -> None:
    """/readyz is 503 until then. A StatefulSet does not replace a pod that never becomes ready."""
    for container in [*refresher_pod["initContainers"], refresher]:
        assert "readinessProbe" not in container
    for name in ("startupProbe", "livenessProbe"):
        assert refresher[name]["httpGet"] == {"path": "/healthz", "port": "ask"}


def test_a_refresh_has_time_to_end(refresher_pod: Object) -> None:
    """One that is killed between request and response can cost the login."""
    assert refresher_pod["terminationGracePeriodSeconds"] >= REFRESH


def test_a_claim_has_the_name_of_the_pod(refresher: Object) -> None:
    """The host name is the same for the pod that replaces this one, and for a copy of the volume in
    another cluster.
    """
    assert settings(refresher).instance == FIELDS["metadata.uid"]


# What is published


def test_the_secret_is_empty(objects: list[Object], refresher: Object) -> None:
    """With data, each apply would put an old token back; stringData even an empty one."""
    secret = named(objects, "Secret", published(refresher).name)
    assert published(refresher).namespace == NAMESPACE == secret["metadata"]["namespace"]
    assert not {"data", "stringData", "immutable"} & set(secret)


def test_the_role_is_that_secret_and_no_more(
    objects: list[Object], refresher_pod: Object, refresher: Object
) -> None:
    """Without resourceNames it would reach every Secret; `create` and `list` know no names."""
    account = refresher_pod["serviceAccountName"]
    binding = next(each for each in objects if each["kind"] == "RoleBinding")
    subject = {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}
    assert binding["subjects"] == [subject]
    role = named(objects, "Role", binding["roleRef"]["name"])
    assert role["rules"] == [
        {
            "apiGroups": [""],
            "resources": ["secrets"],
            "resourceNames": [published(refresher).name],
            "verbs": ["get", "patch"],
        }
    ]
    assert refresher_pod["automountServiceAccountToken"] is True
    # Of any other pod that names the account.
    assert named(objects, "ServiceAccount", account)["automountServiceAccountToken"] is False


def test_an_account_is_bound_without_an_overlay(base: list[Object]) -> None:
    """A subject requires its namespace, which `kubectl apply --namespace` would not add."""
    (subject,) = named(base, "RoleBinding", "xaiproxy-refresher")["subjects"]
    account = named(base, "ServiceAccount", subject["name"])
    assert subject["namespace"] == account["metadata"]["namespace"]


def test_a_new_token_arrives_before_the_old_one_expires(refresher: Object) -> None:
    """Also one whose lifetime is unknown, and after some failures."""
    assert settings(refresher).refresh_skew >= 4 * MOUNTED_WITHIN


# The proxies hold nothing


def test_a_proxy_reads_what_is_published(
    proxy_pod: Object, proxy: Object, refresher: Object
) -> None:
    path = settings(proxy).token_path
    assert path.name == published_secret.KEY
    secret = volume(proxy_pod, mounts(proxy)[str(path.parent)]["name"])["secret"]
    assert secret["secretName"] == published(refresher).name


def test_a_mounted_secret_is_renewed(proxy: Object) -> None:
    """The kubelet does not renew a file that is mounted by subPath."""
    assert all("subPath" not in each for each in proxy["volumeMounts"])


def test_a_mounted_secret_is_readable_and_no_more(proxy_pod: Object, proxy: Object) -> None:
    """It belongs to root, and to the group that fsGroup names."""
    assert proxy_pod["securityContext"]["fsGroup"] == proxy_pod["securityContext"]["runAsGroup"]
    for each in proxy["volumeMounts"]:
        assert each["readOnly"] is True
        assert volume(proxy_pod, each["name"])["secret"]["defaultMode"] == 0o440


def test_a_proxy_has_nothing_that_could_refresh(proxy_pod: Object) -> None:
    """Neither a volume with a login, nor an account that could read or change the Secret."""
    assert proxy_pod["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in proxy_pod
    assert {*proxy_pod["volumes"][0], *proxy_pod["volumes"][1]} == {"name", "secret"}
    assert len(proxy_pod["volumes"]) == 2


def test_other_pods_need_a_client_key(
    objects: list[Object], proxy_pod: Object, proxy: Object
) -> None:
    read = settings(proxy)
    assert read.bind == "0.0.0.0" and not read.allow_anonymous
    path = read.client_keys_file
    secret = volume(proxy_pod, mounts(proxy)[str(path.parent)]["name"])["secret"]
    # An optional one would let the pods start without, and end with status 78.
    assert "optional" not in secret
    # An apply must not replace the keys.
    names = {each["metadata"]["name"] for each in objects if each["kind"] == "Secret"}
    assert secret["secretName"] not in names


# The Service and its pods


def test_readiness_is_that_of_the_token(proxy: Object) -> None:
    """As liveness it would restart every proxy when the login has ended, which helps nothing."""
    paths = {name: each["httpGet"] for name, each in proxy.items() if name.endswith("Probe")}
    assert paths == {
        "startupProbe": {"path": "/healthz", "port": "admin"},
        "livenessProbe": {"path": "/healthz", "port": "admin"},
        "readinessProbe": {"path": "/readyz", "port": "admin"},
    }


def test_open_streams_have_time_to_end(proxy_pod: Object, proxy: Object) -> None:
    read = settings(proxy)
    assert proxy_pod["terminationGracePeriodSeconds"] == 600
    assert read.drain_delay + read.drain_timeout + 30 <= 600
    # Nodes forward connections for seconds after SIGTERM; a preStop hook would need a shell.
    assert read.drain_delay >= 5
    # A reasoning model is silent for minutes.
    assert read.drain_timeout >= 300


def test_an_update_loses_no_capacity(deployment: Object) -> None:
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_autoscaler_sets_the_number_of_proxies(
    objects: list[Object], deployment: Object
) -> None:
    """`replicas` in the Deployment would reset it at each apply."""
    assert "replicas" not in deployment["spec"]
    scaler = named(objects, "HorizontalPodAutoscaler", "xaiproxy")["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    (metric,) = scaler["metrics"]
    target = metric["resource"]["target"]
    # A proxy is one process: with a core or more as the target it would never scale.
    assert target["type"] == "AverageValue"
    assert int(target["averageValue"].removesuffix("m")) < 1000
    # A pod drains for ten minutes.
    assert scaler["behavior"]["scaleDown"]["stabilizationWindowSeconds"] >= 600


def test_nodes_can_be_drained_one_proxy_at_a_time(objects: list[Object]) -> None:
    """With a `minAvailable` of all, or without evictions of pods that are not ready, a drain of a
    node never ends.
    """
    budget = named(objects, "PodDisruptionBudget", "xaiproxy")["spec"]
    scaler = named(objects, "HorizontalPodAutoscaler", "xaiproxy")["spec"]
    assert budget["maxUnavailable"] < scaler["minReplicas"]
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_selectors_match_the_pods(
    objects: list[Object], stateful_set: Object, deployment: Object
) -> None:
    """A Service without pods refuses connections; a policy without pods does nothing."""
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in (stateful_set, deployment)
    }
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "StatefulSet", "Deployment"):
        for each in objects:
            if each["kind"] != kind or each["metadata"]["name"] not in labels:
                continue
            spec = each["spec"]
            selector = spec.get("podSelector") or spec.get("selector")
            pod = labels[each["metadata"]["name"]]
            assert selector.get("matchLabels", selector) == pod, each


def test_proxies_find_the_refresher(
    objects: list[Object], proxy: Object, refresher: Object, stateful_set: Object
) -> None:
    url = urllib.parse.urlsplit(settings(proxy).refresher)
    service = named(objects, "Service", str(url.hostname))
    assert service["metadata"]["name"] == stateful_set["spec"]["serviceName"]
    # A pod's name for itself, and no address but the pod's.
    assert service["spec"]["clusterIP"] == "None"
    assert settings(refresher).ask_bind == ("0.0.0.0", url.port)
    assert [each["containerPort"] for each in refresher["ports"]] == [url.port]
    assert [each["port"] for each in service["spec"]["ports"]] == [url.port]


def test_services_lead_to_the_listeners(objects: list[Object], proxy: Object) -> None:
    read = settings(proxy)
    assert read.admin_bind is not None
    ports = {"api": read.port, "admin": read.admin_bind[1]}
    assert {each["name"]: each["containerPort"] for each in proxy["ports"]} == ports
    service = named(objects, "Service", "xaiproxy")["spec"]
    assert {each["targetPort"]: each["port"] for each in service["ports"]} == ports


def test_no_service_makes_variables_that_are_settings(objects: list[Object]) -> None:
    """XAI_PROXY_PORT=tcp://… of a Service called xai-proxy, in every pod of the namespace."""
    for each in objects:
        if each["kind"] == "Service":
            assert not each["metadata"]["name"].startswith("xai-proxy")


# The network


def allows(
    policy: Object, direction: str, port: int, protocol: str = "TCP", **peer: dict[str, str] | str
) -> bool:
    """Whether a rule of the policy allows it.

    `peer`: `pod` and `namespace`, the labels of a pod and of its namespace if that is another one,
    or `address`
    """
    side = {"ingress": "from", "egress": "to"}[direction]
    for rule in policy["spec"].get(direction, []):
        ports = rule.get("ports")
        if ports is not None and not any(
            (each.get("protocol", "TCP"), each["port"]) == (protocol, port) for each in ports
        ):
            continue
        if side not in rule or any(matches(each, **peer) for each in rule[side]):
            return True
    return False


def matches(peer: Object, **of: Any) -> bool:
    if "ipBlock" in peer:
        address = ipaddress.ip_address(of.get("address", "0.0.0.0"))
        inside, *outside = (
            address in ipaddress.ip_network(each)
            for each in (peer["ipBlock"]["cidr"], *peer["ipBlock"].get("except", []))
        )
        return "address" in of and inside and not any(outside)
    if "pod" not in of or ("namespaceSelector" in peer) != ("namespace" in of):
        return False
    return all(
        labels.get("matchLabels", {}).items() <= of[name].items()
        for name, key in (("pod", "podSelector"), ("namespace", "namespaceSelector"))
        if (labels := peer.get(key)) is not None
    )


def test_the_evaluation_of_policies_knows_what_denies() -> None:
    policy = {
        "spec": {
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {"a": "b"}}}], "ports": [{"port": 1}]}
            ],
            "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}],
        }
    }
    assert allows(policy, "ingress", 1, pod={"a": "b", "c": "d"})
    assert not allows(policy, "ingress", 2, pod={"a": "b"})
    assert not allows(policy, "ingress", 1, pod={"a": "c"})
    assert not allows(policy, "ingress", 1, pod={"a": "b"}, namespace={"x": "y"})
    assert not allows(policy, "ingress", 1, address="10.0.0.1")
    assert allows(policy, "egress", 9, address="10.0.0.1")
    assert not allows(policy, "egress", 9, address="10.1.0.1")
    assert not allows(policy, "egress", 9, pod={"a": "b"})


@pytest.mark.parametrize("name", ["xaiproxy", "xaiproxy-refresher"])
def test_both_may_resolve_names(objects: list[Object], name: str) -> None:
    """Also in a cache on the node, whose address is link-local; long answers come over TCP."""
    policy = named(objects, "NetworkPolicy", name)
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    for protocol in ("UDP", "TCP"):
        assert allows(policy, "egress", 53, protocol, address="169.254.20.10")


def test_proxies_reach_xai_and_the_refresher_only(
    objects: list[Object], stateful_set: Object
) -> None:
    policy = named(objects, "NetworkPolicy", "xaiproxy")
    assert all(allows(policy, "egress", 443, address=each) for each in XAI)
    for address in INTERNAL:
        for port in (443, 6443, 80):
            assert not allows(policy, "egress", port, address=address), address
    labels = stateful_set["spec"]["template"]["metadata"]["labels"]
    assert allows(policy, "egress", 9092, pod=labels)
    assert not allows(policy, "egress", 9092, pod={"app": "other"})


def test_the_refresher_reaches_the_api_server(objects: list[Object]) -> None:
    """A rule is applied to the address and port of its endpoint, not to its ClusterIP and 443."""
    policy = named(objects, "NetworkPolicy", "xaiproxy-refresher")
    for address in INTERNAL[:4]:
        assert allows(policy, "egress", 6443, address=address)
        assert allows(policy, "egress", 443, address=address)
    assert all(allows(policy, "egress", 443, address=each) for each in XAI)


def test_only_proxies_reach_the_refresher(base: list[Object], deployment: Object) -> None:
    policy = named(base, "NetworkPolicy", "xaiproxy-refresher")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert allows(policy, "ingress", 9092, pod=labels)
    assert not allows(policy, "ingress", 9092, pod={"app": "agent"})
    assert not allows(policy, "ingress", 9092, pod=labels, namespace={"name": "other"})


def test_agents_reach_the_api_only(base: list[Object]) -> None:
    """The admin listener requires no client key."""
    policy = named(base, "NetworkPolicy", "xaiproxy")
    assert allows(policy, "ingress", 9090, pod={"app": "agent"})
    assert not allows(policy, "ingress", 9091, pod={"app": "agent"})
    assert not allows(policy, "ingress", 9090, pod={"app": "agent"}, namespace={"name": "other"})


# Rights and memory


def test_nothing_has_rights_that_it_does_not_need(refresher_pod: Object, proxy_pod: Object) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    for pod in (refresher_pod, proxy_pod):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert (security["runAsUser"], security["runAsGroup"]) == (int(user[1]), int(user[2]))
        assert security["fsGroup"] == int(user[2])
        assert pod["enableServiceLinks"] is False
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    # The default changes each file at each start, and gives the token file to its group.
    assert refresher_pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_memory_is_limited_and_cpu_is_not(refresher: Object, proxy: Object) -> None:
    """A CPU limit delays every stream whenever it is reached. Without requests, a full node gets
    further pods.
    """
    for container in (refresher, proxy):
        assert set(container["resources"]["limits"]) == {"memory"}
        assert set(container["resources"]["requests"]) == {"cpu", "memory"}


def test_the_memory_limit_holds_what_a_proxy_accepts(proxy: Object) -> None:
    """A kill by the kernel would cut all streams; one too many gets 503."""
    read = settings(proxy)
    limit = int(proxy["resources"]["limits"]["memory"].removesuffix("Mi")) << 20
    needed = IDLE + USAGE + read.replay_memory + STREAM * read.max_connections
    assert needed <= 0.9 * limit


# The components


def test_a_seed_is_used_once(refresher_pod: Object) -> None:
    """tests/test_kubernetes.py runs the sidecar's script, which is the same."""
    (seed,) = refresher_pod["initContainers"]
    patch = yaml.safe_load((ROOT / "conf/kubernetes/sidecar/seed/patch.yaml").read_text())
    command = [
        each.replace("agent-login-seed", "xaiproxy-login-seed")
        for each in patch[0]["value"]["command"]
    ]
    assert seed["command"] == command
    assert mounts(seed)["/data"]["name"] == "login"
    secret = volume(refresher_pod, mounts(seed)["/seed"]["name"])["secret"]
    # Its owner deletes it after the first start.
    assert secret == {"secretName": "xaiproxy-login-seed", "optional": True}


def test_no_proxy_has_the_seed(proxy_pod: Object) -> None:
    assert "initContainers" not in proxy_pod
    assert "xaiproxy-login-seed" not in yaml.safe_dump(proxy_pod)


def test_prometheus_finds_proxies_and_refresher(objects: list[Object]) -> None:
    spec = named(objects, "ServiceMonitor", "xaiproxy")["spec"]
    (expression,) = spec["selector"]["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("app", "In")
    endpoints = {each["port"] for each in spec["endpoints"]}
    policy = named(objects, "NetworkPolicy", "xaiproxy-prometheus")
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["podSelector"] == spec["selector"]
    # The rules name these jobs, which are the names of the Services.
    for job in ("xaiproxy", "xaiproxy-refresher"):
        service = named(objects, "Service", job)
        assert service["metadata"]["labels"]["app"] in expression["values"]
        (port,) = (each for each in service["spec"]["ports"] if each["name"] in endpoints)
        namespace = {"kubernetes.io/metadata.name": "monitoring"}
        assert allows(policy, "ingress", port["port"], pod={}, namespace=namespace)
        assert not allows(policy, "ingress", 9090, pod={}, namespace=namespace)


def test_the_alerts_are_those_of_prometheus(objects: list[Object]) -> None:
    alerts = yaml.safe_load((ROOT / "conf/prometheus/rules.yml").read_text())
    assert named(objects, "PrometheusRule", "xaiproxy")["spec"] == alerts, "bin/generate"


RULE_TESTS = """\
rule_files: [rules.yml]
evaluation_interval: 30s
tests:
  - name: a refresher that does not answer
    interval: 30s
    input_series:
      - {series: 'up{job="xaiproxy-refresher",namespace="a"}', values: "1x4 0x40"}
    promql_expr_test:
      - {expr: 'ALERTS{alertstate="firing"}', eval_time: 6m}
      - expr: 'count by (alertname) (ALERTS{alertstate="firing"})'
        eval_time: 9m
        exp_samples: [{labels: '{alertname="XaiproxyRefresherDown"}', value: 1}]
  - name: no refresher
    interval: 30s
    input_series:
      - {series: 'up{job="xaiproxy"}', values: "1x40"}
    promql_expr_test:
      - expr: 'count by (alertname) (ALERTS{alertstate="firing"})'
        eval_time: 7m
        exp_samples: [{labels: '{alertname="XaiproxyRefresherDown"}', value: 1}]
  - name: a proxy that keeps the former token, beside one that gets the new one after 90 s
    interval: 30s
    input_series:
      - {series: 'up{job="xaiproxy-refresher",namespace="a"}', values: "1x60"}
      - {series: 'xaiproxy_access_token_obtained_timestamp_seconds{job="xaiproxy-refresher",namespace="a"}', values: "100x10 700x50"}
      - {series: 'xaiproxy_access_token_obtained_timestamp_seconds{job="xaiproxy",namespace="a",instance="stuck"}', values: "100x60"}
      - {series: 'xaiproxy_access_token_obtained_timestamp_seconds{job="xaiproxy",namespace="a",instance="good"}', values: "100x13 700x47"}
      - {series: 'xaiproxy_access_token_obtained_timestamp_seconds{job="xaiproxy",namespace="b",instance="other"}', values: "100x60"}
    promql_expr_test:
      - {expr: 'ALERTS{alertstate="firing"}', eval_time: 10m}
      - expr: 'count by (alertname, instance) (ALERTS{alertstate="firing"})'
        eval_time: 12m
        exp_samples: [{labels: '{alertname="XaiproxyTokenNotDistributed",instance="stuck"}', value: 1}]
"""


@pytest.mark.skipif(not shutil.which("promtool"), reason="prometheus is not installed")
def test_the_alerts_of_a_shared_login(objects: list[Object], tmp_path: Path) -> None:
    rules = named(objects, "PrometheusRule", "xaiproxy-shared")["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    (tmp_path / "tests.yml").write_text(RULE_TESTS)
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
