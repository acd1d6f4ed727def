"""The rendered manifests of the shared login, and what is changed in them for this cluster.

`refresher` and `proxy` make every change that manifest.on_node does not make, and no other.
"""

from __future__ import annotations

import urllib.parse
from typing import Any

from manifests import rendered

from . import manifest
from .cluster import Cluster

SHARED = manifest.SIDECAR.with_name("shared")
REFRESHER, PROXY = "xaiproxy-refresher", "xaiproxy"
LOGIN, KEYS = "xaiproxy-login", "xaiproxy-client-keys"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
Objects = dict[tuple[str, str], dict[str, Any]]


def objects() -> Objects:
    """The objects of the kustomization, by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in rendered(SHARED)}


def claim(objects: Objects) -> dict[str, Any]:
    """The claim that the controller of StatefulSets makes of its template."""
    (template,) = objects["StatefulSet", REFRESHER]["spec"]["volumeClaimTemplates"]
    # ReadWriteOncePod is of 1.22.
    spec = {**template["spec"], "accessModes": ["ReadWriteOnce"]}
    name = f"{template['metadata']['name']}-{REFRESHER}-0"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": spec,
    }


def refresher(
    objects: Objects, cluster: Cluster, name: str, ask_port: int, environ: dict[str, str]
) -> dict[str, Any]:
    """`environ`: further variables."""
    pod = manifest.on_node(objects["StatefulSet", REFRESHER], name)
    spec = pod["spec"]
    (container,) = spec["containers"]
    volume = claim(objects)["metadata"]["name"]
    spec["volumes"] = [{"name": "login", "persistentVolumeClaim": {"claimName": volume}}]
    add_account(spec)
    # A kubelet makes variables with the ClusterIP of the API server, which leads nowhere here.
    server = urllib.parse.urlsplit(cluster.url)
    address = {
        "KUBERNETES_SERVICE_HOST": str(server.hostname),
        "KUBERNETES_SERVICE_PORT": str(server.port),
    }
    ask = {"XAI_PROXY_ASK_BIND": f"127.0.0.1:{ask_port}"}
    manifest.add_environ(container, {**address, **ask, **environ})
    manifest.listen(container, {"ask": ask_port})
    return pod


def add_account(spec: dict[str, Any]) -> None:
    """Mount the service account as kubelets do from 1.21 on."""
    assert spec["automountServiceAccountToken"]
    spec["automountServiceAccountToken"] = False
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
        {"configMap": {"name": "kube-root-ca.crt"}},
    ]
    spec["volumes"].append({"name": "account", "projected": {"sources": sources}})
    mount = {"name": "account", "mountPath": ACCOUNT, "readOnly": True}
    spec["containers"][0]["volumeMounts"].append(mount)


def proxy(
    objects: Objects, name: str, ports: tuple[int, int], ask_port: int, environ: dict[str, str]
) -> dict[str, Any]:
    """`ports`: of the API and of the admin listener; `environ`: further variables"""
    pod = manifest.on_node(objects["Deployment", PROXY], name)
    (container,) = pod["spec"]["containers"]
    port, admin = ports
    listeners = {
        "XAI_PROXY_PORT": str(port),
        "XAI_PROXY_BIND": "127.0.0.1",
        "XAI_PROXY_ADMIN_BIND": f"127.0.0.1:{admin}",
        # There is no DNS for the names of Services.
        "XAI_PROXY_REFRESHER": f"http://127.0.0.1:{ask_port}",
    }
    manifest.add_environ(container, {**listeners, **environ})
    manifest.listen(container, {"api": port, "admin": admin})
    return pod
