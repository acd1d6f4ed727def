"""The sandbox, which also writes every secret that it issues or receives to a file.

The file is its first argument.
"""

from gevent import monkey

monkey.patch_all()

import sys
from typing import Any

from xaiproxy.sandbox import app, command, grants

FILE = sys.argv.pop(1)


def record(kind: str, secret: str) -> str:
    with open(FILE, "a") as file:
        file.write(f"{kind} {secret}\n")
    return secret


class Grants(grants.Grants):
    def _jwt(self, claims: dict[str, Any]) -> str:
        return record("id_token" if "email" in claims else "access_token", super()._jwt(claims))

    def _rotate(self, family: grants.Family) -> None:
        super()._rotate(family)
        record("refresh_token", family.refresh_token)

    def device_authorization(self, scope: str, challenge: str | None) -> dict[str, Any]:
        answer = super().device_authorization(scope, challenge)
        record("device_code", answer["device_code"])
        return answer

    def exchange(self, code: str, redirect_uri: str, verifier: str) -> dict[str, Any]:
        record("verifier", verifier)
        return super().exchange(record("code", code), redirect_uri, verifier)


app.Grants = Grants
sys.exit(command.main())
