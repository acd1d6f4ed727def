"""The rendered manifests, and what is changed in them for a cluster of one old kubelet.

The cluster has an API server and a kubelet of Kubernetes 1.20, and neither controllers, scheduler,
pod network nor registry. `adapted` makes every change that this requires, and no other.
"""

from __future__ import annotations

import copy
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import yaml

SIDECAR = pathlib.Path(__file__).parents[2] / "conf/kubernetes/sidecar"
KUBECTL = str(pathlib.Path(sys.executable).with_name("kubectl"))
IMAGE = "localhost/xaiproxy:1"
UID = 10001
OVERLAY = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [sidecar]
components: [sidecar/seed]
"""


def rendered(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The objects of the kustomization with the component `seed`, by kind."""
    shutil.copytree(SIDECAR, folder / "sidecar")
    (folder / "kustomization.yaml").write_text(OVERLAY)
    command = [KUBECTL, "kustomize", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}


def adapted(
    deployment: dict[str, Any], name: str, ports: tuple[int, int], environ: dict[str, str]
) -> dict[str, Any]:
    """The pod of the deployment's template, for this cluster.

    `ports`: of the API and of the admin listener
    `environ`: further variables of the proxy
    """
    template = copy.deepcopy(deployment["spec"]["template"])
    spec = template["spec"]
    # There is no Deployment controller: the play deletes a pod before it creates the next one, as
    # `strategy: Recreate` does.
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **template["metadata"]},
        "spec": spec,
    }
    # There are no native sidecars: the proxy is an ordinary container, which starts beside the
    # agent, and gets SIGTERM with it and not after it.
    *others, proxy = spec["initContainers"]
    del proxy["restartPolicy"]
    spec["initContainers"] = others
    spec["containers"].insert(0, proxy)
    # There is no registry; the agent's command is run in the proxy's image, which has a shell.
    for container in [*others, *spec["containers"]]:
        container.update(image=IMAGE, imagePullPolicy="Never")
    # There is no scheduler.
    spec["nodeName"] = "node"
    spec["tolerations"] = [{"operator": "Exists"}]
    # There is no pod network. On that of the machine the usual ports may be in use.
    spec["hostNetwork"] = True
    port, admin = ports
    settings = {each["name"]: each["value"] for each in proxy["env"]}
    settings.update(environ, XAI_PROXY_PORT=str(port), XAI_PROXY_ADMIN_BIND=f"127.0.0.1:{admin}")
    proxy["env"] = [{"name": name, "value": value} for name, value in settings.items()]
    proxy["ports"][0]["containerPort"] = admin
    for probe in ("startupProbe", "livenessProbe"):
        proxy[probe]["httpGet"]["host"] = "127.0.0.1"
    return pod


def volume(folder: pathlib.Path) -> dict[str, Any]:
    """A volume for the claim of the manifests, which nothing here would provision."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {},
        "spec": {
            "capacity": {"storage": "16Mi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": str(folder)},
            "nodeAffinity": {
                "required": {
                    "nodeSelectorTerms": [
                        {
                            "matchExpressions": [
                                {
                                    "key": "kubernetes.io/hostname",
                                    "operator": "In",
                                    "values": ["node"],
                                }
                            ]
                        }
                    ]
                }
            },
        },
    }
