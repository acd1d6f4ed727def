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
    """The pod of the sidecar's template, for this cluster.

    `ports`: of the API and of the admin listener
    `environ`: further variables of the proxy
    """
    pod = on_node(deployment, name)
    spec = pod["spec"]
    # There are no native sidecars: the proxy is an ordinary container, which starts beside the
    # agent, and gets SIGTERM with it and not after it.
    *others, proxy = spec["initContainers"]
    del proxy["restartPolicy"]
    spec["initContainers"] = others
    spec["containers"].insert(0, proxy)
    port, admin = ports
    add_environ(
        proxy,
        {
            **environ,
            "XAI_PROXY_PORT": str(port),
            "XAI_PROXY_ADMIN_BIND": f"127.0.0.1:{admin}",
        },
    )
    listen(proxy, {"admin": admin})
    return pod


def on_node(owner: dict[str, Any], name: str) -> dict[str, Any]:
    """A pod of the template of a Deployment or StatefulSet, which has no controller here: the play
    deletes a pod before it creates the next one, as both of them do.
    """
    template = copy.deepcopy(owner["spec"]["template"])
    spec = template["spec"]
    # There is no registry; an agent's command is run in the proxy's image, which has a shell.
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        container.update(image=IMAGE, imagePullPolicy="Never")
    # There is no scheduler.
    spec["nodeName"] = "node"
    spec["tolerations"] = [{"operator": "Exists"}]
    # There is no pod network.
    spec["hostNetwork"] = True
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, **template["metadata"]},
        "spec": spec,
    }


def add_environ(container: dict[str, Any], environ: dict[str, str]) -> None:
    """Set variables, in place of those with the same names."""
    kept = [each for each in container["env"] if each["name"] not in environ]
    container["env"] = kept + [{"name": name, "value": value} for name, value in environ.items()]


def listen(container: dict[str, Any], ports: dict[str, int]) -> None:
    """Change the numbers of ports: on the network of the machine the usual ones may be in use."""
    for each in container["ports"]:
        each["containerPort"] = ports.get(each["name"], each["containerPort"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            container[probe]["httpGet"]["host"] = "127.0.0.1"


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
