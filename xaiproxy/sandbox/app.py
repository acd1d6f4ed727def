"""The whole sandbox as one WSGI application, with /_sandbox to control it."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from flask import Blueprint, Flask, abort, request
from werkzeug.routing import Map

from xaiproxy.sandbox import api, authorization_server
from xaiproxy.sandbox.edge import Edge
from xaiproxy.sandbox.grants import Grants
from xaiproxy.sandbox.knobs import BadKnob, Knobs
from xaiproxy.sandbox.replies import Answer, reply
from xaiproxy.sandbox.witness import Witness
from xaiproxy.sandbox.xai_errors import error


def create_app(origin: str, knobs: Knobs) -> Edge:
    """The application for a server at this origin."""
    witness = Witness()
    grants = Grants(origin, knobs, witness)
    app = Flask(__name__, static_folder=None)
    # A bug of the sandbox is a traceback on stderr.
    app.config["PROPAGATE_EXCEPTIONS"] = True
    # A doubled slash is another path, not a redirect.
    app.url_map = Map(merge_slashes=False)
    app.register_blueprint(authorization_server.create(grants))
    app.register_blueprint(api.create(grants))
    app.register_blueprint(steering(grants, witness))
    app.register_error_handler(404, lambda _: error("no_route"))
    app.register_error_handler(
        405,
        lambda problem: reply(
            "Method Not Allowed", 405, {"Allow": ", ".join(problem.valid_methods)}
        ),
    )
    app.add_url_rule(
        "/oauth/token",
        "retired_token_endpoint",
        lambda: error("cloudflare_challenge"),
        methods=["GET", "POST"],
    )
    return Edge(app, urlsplit(origin).netloc, knobs, witness)


def steering(grants: Grants, witness: Witness) -> Blueprint:
    """Counters, knobs and recorded requests, for programs on this machine but not for web pages."""
    control = Blueprint("control", __name__, url_prefix="/_sandbox")
    knobs = grants.knobs

    @control.before_request
    def refuse_web_pages() -> None:
        # A POST by a web page always has an Origin, and after DNS rebinding Host is another name.
        if "Origin" in request.headers or not is_loopback(request.headers.get("Host", "")):
            abort(
                reply(
                    {"error": "/_sandbox is for programs on this machine, not for web pages"}, 403
                )
            )

    @control.errorhandler(BadKnob)
    def bad_knob(problem: BadKnob) -> Answer:
        return reply({"error": str(problem)}, 400)

    @control.get("")
    def counters() -> Answer:
        return reply(witness.counters)

    @control.post("")
    def set_knobs() -> Answer:
        values = request.get_json(force=True, silent=True)
        if not isinstance(values, dict):
            raise BadKnob("the body of POST /_sandbox must be a JSON object of knobs")
        knobs.set(values)
        return reply(knobs.as_dict())

    @control.delete("")
    def reset() -> Answer:
        """Reset every knob to its start value and every counter to zero; logins stay."""
        knobs.reset()
        witness.reset()
        return reply(knobs.as_dict())

    @control.get("/knobs")
    def get_knobs() -> Answer:
        return reply(knobs.as_dict())

    @control.get("/requests")
    def requests() -> Answer:
        return reply(list(witness.requests))

    @control.post("/revoke")
    def revoke() -> Answer:
        """Revoke all of {"what": "access_tokens"} or {"what": "logins"} at once."""
        what = (request.get_json(force=True, silent=True) or {}).get("what")
        if what not in ("access_tokens", "logins"):
            raise BadKnob('"what" must be access_tokens or logins')
        for access in grants.access_tokens.values():
            access.revoked = True
        if what == "logins":
            for family in set(grants.families.values()):
                grants.revoke(family)
        return reply({})

    return control


def is_loopback(host: str) -> bool:
    name: Any = urlsplit(f"//{host}").hostname
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
