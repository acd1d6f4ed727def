"""The pages on which the user allows or denies a login."""

from __future__ import annotations

from html import escape

from xaiproxy.sandbox.grants import Request
from xaiproxy.sandbox.replies import compact, page

# As on accounts.x.ai, the authorization response is not a redirect: the page fetches the client's
# URL, which the browser allows only after a CORS and Private Network Access preflight. If that
# fails, the page shows the code.
SCRIPT = """
async function decide(decision) {
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  const form = new URLSearchParams({request: %(request)s, decision});
  const answer = await fetch("/oauth2/authorize", {method: "POST", body: form});
  const result = answer.ok ? await answer.json() : {};
  try {
    // From a page on loopback, the browser sends a preflight only because of this header.
    const headers = {"Content-Type": "application/json"};
    if (!(await fetch(result.url, {headers})).ok) throw new Error("refused");
    document.getElementById("outcome").textContent = "Done. You can close this window.";
  } catch (failure) {
    document.getElementById("outcome").textContent =
      result.code
        ? "Enter this code to finish signing in"
        : "Access denied. You can close this window.";
    document.getElementById("code").textContent = result.code || "";
  }
}
for (const id of ["allow", "deny"]) document.getElementById(id).onclick = () => decide(id);
const seconds = %(seconds)s;
if (seconds !== null) setTimeout(() => document.getElementById("allow").click(), seconds * 1000);
"""


def browser_page(handle: str, asked: Request, auto_approve: float | None) -> str:
    """The consent page for an authorization request."""
    script = SCRIPT % {"request": compact(handle), "seconds": compact(auto_approve)}
    return page(
        "Authorize",
        f"<h1>Authorize Grok Build</h1><p>It asks for: {escape(asked.scope)}</p>"
        '<button id="allow">Allow</button> <button id="deny">Deny</button>'
        '<p id="outcome"></p><pre id="code"></pre>'
        f'<script data-request="{handle}">{script}</script>',
    )


def refusal_page(problem: str) -> str:
    """The page for an invalid authorization request, instead of a consent page."""
    return page(
        "Access denied",
        "<h1>Access denied</h1><p>Failed to generate authentication code &mdash; "
        f"{escape(problem)}</p>",
    )


def device_page(user_code: str, problem: str = "") -> str:
    """The page with the form for a user code (RFC 8628 3.3)."""
    return page(
        "Device",
        f"<h1>Connect a device</h1><p>{escape(problem)}</p>"
        '<form method="post" action="/oauth2/device">'
        '<input name="user_code" id="user_code" placeholder="XXXX-XXXX"'
        f' value="{escape(user_code)}">'
        '<button id="allow" name="decision" value="allow">Allow</button> '
        '<button id="deny" name="decision" value="deny">Deny</button></form>',
    )
