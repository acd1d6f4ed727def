"""A real API server of Kubernetes with etcd, as ../shared/kube starts it, and one Secret with a Role."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shlex
import shutil
import ssl
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from refresher_process import mounted

SCRIPTS = ROOT.parent / "shared" / "kube"
MISSING = (
    f"{SCRIPTS} or etcd (etcd-server) is not installed"
    if not (SCRIPTS / "up").exists() or shutil.which("etcd") is None
    else ""
)
needs_kube = pytest.mark.skipif(bool(MISSING), reason=MISSING)
NAMESPACE, NAME = "apps", "xai-login"
SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets"
SECRET = f"{SECRETS}/{NAME}"
ACCOUNTS = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts"
ROLES = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}/roles"
BINDINGS = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{NAMESPACE}/rolebindings"
PUBLISH = f"kubernetes-secret:{NAMESPACE}/{NAME}"
MERGE = "application/merge-patch+json"


class Kube:
    """`account`: folder with what a pod of the service account has of it."""

    def __init__(
        self,
        folder: Path,
        *flags: str,
        seconds: int = 600,
        running: contextlib.ExitStack | None = None,
    ):
        """`flags`: for kube-apiserver, which ends by itself after `seconds`.

        `running`: calls `down`, also if this is interrupted.
        """
        self._folder, self._seconds = folder, seconds
        folder.mkdir(exist_ok=True)
        if running is not None:
            running.callback(self.down)
        self._up(*flags)
        self.call("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        self.call("POST", ACCOUNTS, {"metadata": {"name": "refresher"}})
        binding = {
            "metadata": {"name": "refresher"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": "refresher",
            },
            "subjects": [
                {"kind": "ServiceAccount", "name": "refresher", "namespace": NAMESPACE},
            ],
        }
        assert self.call("POST", BINDINGS, binding)[0] == 201
        self.allow()
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 3600},
        }
        status, answer = self.call("POST", f"{ACCOUNTS}/refresher/token", request)
        assert status == 201, answer
        self.token = answer["status"]["token"]
        self.account = folder / "account"
        self.account.mkdir()
        (self.account / "token").write_text(self.token)
        (self.account / "ca.crt").write_bytes(Path(self._env["KUBE_CA"]).read_bytes())

    def _up(self, *flags: str) -> None:
        written = subprocess.run(
            [SCRIPTS / "up", self._folder, *flags],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "KUBE_SECONDS": str(self._seconds)},
        ).stdout
        self._env = dict(shlex.split(line)[0].split("=", 1) for line in written.splitlines())
        address = urllib.parse.urlsplit(self._env["KUBE_URL"])
        self.host, self.port = address.hostname, address.port
        self._context = ssl.create_default_context(cafile=self._env["KUBE_CA"])

    def signal(self, number: int) -> None:
        """Send a signal to the API server."""
        os.kill(int(self._env["KUBE_APISERVER_PID"]), number)

    def down(self) -> None:
        subprocess.run([SCRIPTS / "down", self._folder], check=True)

    @property
    def environ(self) -> dict[str, str]:
        """What a pod's environment has of the API server."""
        return {
            "KUBERNETES_SERVICE_HOST": str(self.host),
            "KUBERNETES_SERVICE_PORT": str(self.port),
        }

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = "",
        kind: str = "application/json",
    ) -> tuple[int, Any]:
        """Return the status and the body. `token`: "" is the administrator's, None is none."""
        headers = {"Content-Type": kind}
        if token is not None:
            headers["Authorization"] = f"Bearer {token or self._env['KUBE_ADMIN_TOKEN']}"
        connection = http.client.HTTPSConnection(
            self.host, self.port, timeout=30, context=self._context
        )
        try:
            connection.request(method, path, body and json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        is_json = answer.getheader("Content-Type") == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode()

    def allow(self) -> None:
        """Let the service account get and patch the Secret."""
        rule = {
            "apiGroups": [""],
            "resources": ["secrets"],
            "resourceNames": [NAME],
            "verbs": ["get", "patch"],
        }
        self.call("POST", ROLES, {"metadata": {"name": "refresher"}, "rules": [rule]})

    def forbid(self) -> None:
        self.call("DELETE", f"{ROLES}/refresher")

    def make_secret(self, **data: str) -> None:
        """Make the Secret anew. `data`: texts by key, whose "__" is a dot."""
        self.call("DELETE", SECRET)
        body = {"metadata": {"name": NAME}, "data": _encoded(data)}
        assert self.call("POST", SECRETS, body)[0] == 201

    def put(self, **data: str) -> None:
        """Replace all data of the Secret, as `kubectl replace` does."""
        body = {"metadata": {"name": NAME}, "data": _encoded(data)}
        assert self.call("PUT", SECRET, body)[0] == 200

    def secret(self) -> dict[str, Any]:
        status, secret = self.call("GET", SECRET)
        assert status == 200, secret
        return secret

    def data(self) -> dict[str, str]:
        data = self.secret().get("data") or {}
        return {name: base64.b64decode(value).decode() for name, value in data.items()}

    def published(self) -> dict[str, Any]:
        """Return the published token file, or {}."""
        return json.loads(self.data().get("tokens.json") or "{}")

    def claim(self) -> str:
        return (self.secret()["metadata"].get("annotations") or {}).get("xaiproxy/spends", "")


def in_pod(account: Path) -> list[str]:
    """A prefix with which a process finds the service account's folder where a pod has it."""
    place = "/run/secrets/kubernetes.io/serviceaccount"
    return mounted(f'mount -t tmpfs t /run; mkdir -p {place}; mount --bind "$1" {place}', account)


def _encoded(data: dict[str, str]) -> dict[str, str]:
    return {
        name.replace("__", "."): base64.b64encode(text.encode()).decode()
        for name, text in data.items()
    }
