"""conf/kubernetes/sidecar: what is rendered is valid, and avoids traps that end a login or a pod.

Each assertion has its reason. No API server is asked: kubernetes-validate has the schemas of
releases, and --strict refuses unknown fields, which an API server would drop.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from manifests import RELEASES, rendered, settings, validate
from sandbox import until

pytest.importorskip("kubernetes_validate")

SIDECAR = ROOT / "conf/kubernetes/sidecar"
# Seconds of a termination for a refresh in progress and the end of the agent.
REST = 60


def with_seed(folder: Path) -> Path:
    """An overlay that has the component, as a user writes it."""
    shutil.copytree(SIDECAR, folder / "sidecar")
    overlay = folder / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        "resources: [../sidecar]\ncomponents: [../sidecar/seed]\n"
    )
    return overlay


@pytest.fixture(scope="module", params=["sidecar", "seed"])
def objects(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What is applied, without and with a seed."""
    if request.param == "sidecar":
        return rendered(SIDECAR)
    return rendered(with_seed(tmp_path_factory.mktemp("kubernetes")))


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (each["spec"] for each in objects if each["kind"] == kind)
    assert isinstance(found, dict)
    return found


@pytest.fixture
def deployment(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return of_kind(objects, "Deployment")


@pytest.fixture
def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    found = deployment["template"]["spec"]
    assert isinstance(found, dict)
    return found


@pytest.fixture
def sidecar(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = (each for each in pod["initContainers"] if each["name"] == "xaiproxy")
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("release", RELEASES)
def test_no_field_is_unknown(objects: list[dict[str, Any]], release: str, tmp_path: Path) -> None:
    validate(objects, release, tmp_path)


def test_it_is_a_native_sidecar(sidecar: dict[str, Any], pod: dict[str, Any]) -> None:
    """As another container it could end before the agent, and start after it."""
    assert sidecar["restartPolicy"] == "Always"
    assert [each["name"] for each in pod["containers"]] == ["agent"]


def test_the_pod_starts_before_a_sign_in(sidecar: dict[str, Any], pod: dict[str, Any]) -> None:
    """/readyz is 503 until then. A probe that asks it keeps the agent from starting, ends the
    container in which one signs in, or takes the agent out of its Services.
    """
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert "readinessProbe" not in container
    for name in ("startupProbe", "livenessProbe"):
        assert sidecar[name]["httpGet"]["path"] == "/healthz"


def test_probes_reach_the_admin_listener(sidecar: dict[str, Any]) -> None:
    """The kubelet connects to the pod's address, which loopback is not."""
    read = settings(sidecar)
    assert read.bind == "127.0.0.1"
    assert read.admin_bind is not None
    address, port = read.admin_bind
    assert address == "0.0.0.0"
    (admin,) = sidecar["ports"]
    assert (admin["name"], admin["containerPort"]) == ("admin", port)
    for name in ("startupProbe", "livenessProbe"):
        assert sidecar[name]["httpGet"]["port"] == "admin"


def test_there_is_time_for_streams_and_a_refresh_to_end(
    sidecar: dict[str, Any], pod: dict[str, Any]
) -> None:
    """A refresh that is killed between request and answer can cost the login."""
    read = settings(sidecar)
    needed = read.drain_delay + read.drain_timeout + REST
    assert pod["terminationGracePeriodSeconds"] >= needed


def test_the_agent_ends_at_sigterm(pod: dict[str, Any]) -> None:
    """The sidecar gets SIGTERM after the agent has ended, and SIGKILL when the time is over. A first
    process of a container ignores SIGTERM unless it has a handler.
    """
    (agent,) = pod["containers"]
    with subprocess.Popen(agent["command"], start_new_session=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(children.read_text)
        process.terminate()
        try:
            # -15 without a handler.
            assert process.wait(20) == 0
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_login_is_on_a_volume_that_outlives_the_pod(
    objects: list[dict[str, Any]], pod: dict[str, Any], sidecar: dict[str, Any]
) -> None:
    """An emptyDir would lose it with its first pod; a Secret or ConfigMap is read-only."""
    mounts = {each["mountPath"]: each for each in sidecar["volumeMounts"]}
    (volume,) = (each for each in pod["volumes"] if each["name"] == mounts["/data"]["name"])
    (claim,) = (each for each in objects if each["kind"] == "PersistentVolumeClaim")
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    # A file that is mounted by subPath cannot be replaced by rename.
    assert all("subPath" not in each for each in mounts.values())
    # fsGroup gives the root of the volume mode 2775: the folder of the login is another one.
    assert settings(sidecar).token_path == Path("/data/login/tokens.json")


def test_only_the_proxy_can_read_the_login(pod: dict[str, Any]) -> None:
    for container in pod["containers"]:
        names = {each["name"] for each in container.get("volumeMounts", [])}
        assert not names & {"login", "seed"}
    # With it /proc/PID/root of the proxy's processes would lead there.
    assert pod["shareProcessNamespace"] is False


def test_there_is_one_refresher_at_a_time(deployment: dict[str, Any]) -> None:
    """N replicas need N logins. A rolling update would start the next pod beside the former, which
    waits forever for the volume, or refreshes beside it.
    """
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}


def test_the_volume_belongs_to_the_user_of_the_image(pod: dict[str, Any]) -> None:
    security = pod["securityContext"]
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    assert (security["runAsUser"], security["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert security["fsGroup"] == security["runAsGroup"]
    # The default changes each file at each start, and gives the token file to its group.
    assert security["fsGroupChangePolicy"] == "OnRootMismatch"


def test_nothing_has_rights_that_it_does_not_need(pod: dict[str, Any]) -> None:
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    # A token for the API server, and variables like XAI_PROXY_PORT=tcp://… of a Service.
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_memory_is_limited_and_cpu_is_not(sidecar: dict[str, Any]) -> None:
    """A CPU limit delays every stream whenever it is reached."""
    assert set(sidecar["resources"]["limits"]) == {"memory"}
    limit = int(sidecar["resources"]["limits"]["memory"].removesuffix("Mi")) << 20
    # The three idle processes, and content whose usage is counted, take less than the rest.
    assert settings(sidecar).replay_memory <= limit - (256 << 20)


# The seed


@pytest.fixture
def seed(tmp_path: Path) -> list[str]:
    """The command of the seed's container, with folders of the test in place of its mounts."""
    pod = of_kind(rendered(with_seed(tmp_path)), "Deployment")["template"]["spec"]
    container = pod["initContainers"][0]
    assert container["name"] == "seed"
    for name in ("data", "seed"):
        (tmp_path / name).mkdir()
    return [re.sub(r"/(data|seed)\b", rf"{tmp_path}/\1", each) for each in container["command"]]


def test_the_pod_starts_without_the_seed(tmp_path: Path) -> None:
    """Its owner deletes it after the first start."""
    pod = of_kind(rendered(with_seed(tmp_path)), "Deployment")["template"]["spec"]
    (volume,) = (each for each in pod["volumes"] if each["name"] == "seed")
    assert volume["secret"] == {"secretName": "agent-login-seed", "optional": True}


def test_a_seed_is_used_once(tmp_path: Path, seed: list[str]) -> None:
    """A second start would put back a refresh token that is spent."""
    (tmp_path / "seed/tokens.json").write_text("the seed")
    login = tmp_path / "data/login/tokens.json"
    done = subprocess.run(seed, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert "delete the Secret agent-login-seed now" in done.stdout
    assert (login.read_text(), login.stat().st_mode & 0o777) == ("the seed", 0o600)
    assert login.parent.stat().st_mode & 0o777 == 0o700
    login.write_text("renewed")
    done = subprocess.run(seed, capture_output=True, text=True, timeout=20)
    assert (done.returncode, login.read_text()) == (0, "renewed")
    assert os.listdir(login.parent) == ["tokens.json"]


def test_without_a_seed_the_pod_starts_and_says_what_to_do(tmp_path: Path, seed: list[str]) -> None:
    done = subprocess.run(seed, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and "sign in with xai-login --device" in done.stdout
    assert os.listdir(tmp_path / "data") == []


def test_a_seed_that_cannot_be_copied_fails_and_leaves_no_login(
    tmp_path: Path, seed: list[str]
) -> None:
    (tmp_path / "seed/tokens.json").mkdir()
    done = subprocess.run(seed, capture_output=True, text=True, timeout=20)
    assert done.returncode != 0 and done.stderr
    assert not (tmp_path / "data/login/tokens.json").exists()
