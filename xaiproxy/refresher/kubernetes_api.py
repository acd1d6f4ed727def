"""The API server of the cluster as the pod's service account uses it: get and patch of one Secret.

The token and the CA certificate are read anew for each request, because the kubelet replaces them.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from xaiproxy import config, errors, folder_file, token_json
from xaiproxy.egress import Egress
from xaiproxy.oauth.session import Answer, Session
from xaiproxy.setting_types import SecretName

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_LIMIT = 1 << 16  # bytes; a real token has about 1,000
MERGE_PATCH = "application/merge-patch+json"
REASON = re.compile(r"[A-Za-z]{1,40}")


class Api:
    """`account`: folder with the service account's token and the cluster's CA certificate.

    Raises ConfigurationError outside of a cluster.
    """

    def __init__(self, settings: config.Config, secret: SecretName, account: Path = ACCOUNT):
        self._token_path, ca_path = account / "token", account / "ca.crt"
        if not (settings.kubernetes_api and self._token_path.exists() and ca_path.exists()):
            raise errors.ConfigurationError(
                f"XAI_PROXY_PUBLISH=kubernetes-secret:{secret} requires a pod with a service "
                f"account: KUBERNETES_SERVICE_HOST, and token and ca.crt in {account}",
                "XAI_PROXY_PUBLISH",
            )
        self._secret = secret
        self._url = (
            f"{settings.kubernetes_api}/api/v1/namespaces/{secret.namespace}/secrets/{secret.name}"
        )
        # Without a proxy: the address is one of the cluster's network.
        egress = Egress(ca_file=str(ca_path), ca_from="the service account")
        self._web = Session(
            dataclasses.replace(settings, egress=egress), address_from="KUBERNETES_SERVICE_HOST"
        )

    def get(self, deadline: float) -> dict[str, Any]:
        """Return the Secret. Raises PublishError."""
        try:
            answer = self._web.get(self._url, deadline, self._headers())
        except errors.IssuerUnavailable as error:
            raise errors.PublishError(str(error)) from error
        if answer.status == 404:
            raise errors.PublishError(
                f"the Secret {self._secret} does not exist; create it without data: "
                f"`kubectl create secret generic -n {self._secret.namespace} {self._secret.name}`"
            )
        secret = answer.json()
        if answer.status != 200 or secret is None:
            raise self._refusal(answer, "get")
        return secret

    def patch(self, changes: dict[str, Any], deadline: float) -> bool:
        """Merge `changes` into the Secret; return False if it was changed or deleted meanwhile.

        `changes`: with the resourceVersion that they are about. Raises PublishError.
        """
        headers = {**self._headers(), "Content-Type": MERGE_PATCH}
        try:
            answer = self._web.patch(self._url, json.dumps(changes).encode(), headers, deadline)
        except errors.IssuerUnavailable as error:
            raise errors.PublishError(str(error)) from error
        if answer.status in (404, 409):
            return False
        if answer.status != 200:
            raise self._refusal(answer, "patch")
        return True

    def _headers(self) -> dict[str, str]:
        try:
            content = folder_file.read(self._token_path, TOKEN_LIMIT, follow=True)[0]
            token = content.decode("ascii").strip()
            if not token_json.B64TOKEN.fullmatch(token):
                raise ValueError
        except (OSError, ValueError) as error:
            raise errors.PublishError(
                f"{self._token_path} holds no token of a service account that can be read"
            ) from error
        return {"Authorization": f"Bearer {token}"}

    def _refusal(self, answer: Answer, verb: str) -> errors.PublishError:
        status = f"HTTP {answer.status}"
        # A Status object names its reason in one word; 429 is plain text.
        reason = (answer.json() or {}).get("reason")
        if isinstance(reason, str) and REASON.fullmatch(reason):
            status += f", {reason}"
        advice = {
            401: f"the token in {self._token_path} is not accepted",
            403: f"let the service account {verb} that Secret, with a Role that names it",
            429: "too many requests at once",
        }.get(answer.status, "check the API server")
        return errors.PublishError(
            f"the API server did not {verb} the Secret {self._secret} ({status}); {advice}",
            answer.retry_after,
        )
