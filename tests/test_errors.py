"""The proxy's own errors: one shape, a stable code, and a status that clients handle well."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xaiproxy import errors

# As in docs/operating.md: class, status, code, and whether an SDK may repeat the request.
REFUSALS = [
    (errors.ErrorResponse, 500, "internal_error", None),
    (errors.BadRequest, 400, "bad_request", "false"),
    (errors.HeadTooLarge, 431, "bad_request", "false"),
    (errors.LoginRequired, 401, "login_required", "false"),
    (errors.ClientKeyRequired, 401, "client_key_required", "false"),
    (errors.HostNotAllowed, 403, "host_not_allowed", "false"),
    (errors.OriginNotAllowed, 403, "origin_not_allowed", "false"),
    (errors.NotFound, 404, "not_found", "false"),
    (errors.MethodNotAllowed, 405, "method_not_allowed", "false"),
    (errors.ClientTimeout, 408, "client_timeout", "false"),
    (errors.UpstreamUnreachable, 502, "upstream_unreachable", "false"),
    (errors.TokenUnavailable, 503, "token_unavailable", "true"),
    (errors.TooManyConnections, 503, "too_many_connections", "true"),
    (errors.UpstreamTimeout, 504, "upstream_timeout", "false"),
    (errors.LoopDetected, 508, "loop_detected", "false"),
]


def make(kind, message="what happened", **how) -> errors.ErrorResponse:
    return kind(message, 7) if kind is errors.TokenUnavailable else kind(message, **how)


def test_every_refusal_is_in_the_table():
    def all_of(kind):
        return {kind}.union(*map(all_of, kind.__subclasses__()))

    assert all_of(errors.ErrorResponse) == {kind for kind, *_ in REFUSALS}


@pytest.mark.parametrize(
    "kind, status, code, repeat", REFUSALS, ids=[kind.__name__ for kind, *_ in REFUSALS]
)
def test_a_refusal_is_json_with_a_message_a_type_and_a_code(kind, status, code, repeat):
    line, fields, body = make(kind).rendered()
    assert int(line.split(" ", 1)[0]) == status and len(line) > 4
    error = json.loads(body)["error"]
    assert list(json.loads(body)) == ["error"] and list(error) == ["message", "type", "code"]
    assert (error["message"], error["code"]) == ("what happened", code) and error["type"].endswith(
        "_error"
    )
    values = dict(fields)
    assert len(values) == len(fields)
    assert (values["Content-Type"], values["X-XAI-Proxy-Error"]) == ("application/json", code)
    assert values["Content-Length"] == str(len(body)) and body.endswith(b"}\n")
    assert values.get("x-should-retry") == repeat and (status >= 500 or repeat == "false")


def test_only_a_fault_outside_of_the_proxy_is_a_server_error():
    for kind, status, _, _ in REFUSALS:
        error = json.loads(make(kind).rendered()[2])["error"]
        assert (error["type"] == "api_error") is (status >= 500)
        assert (error["type"] == "authentication_error") is (status == 401)


def test_every_401_has_a_challenge():
    for kind, status, _, _ in REFUSALS:
        challenges = [
            value for name, value in make(kind).rendered()[1] if name == "WWW-Authenticate"
        ]
        assert challenges == (['Bearer realm="xaiproxy"'] if status == 401 else [])


def test_retry_after_is_in_seconds():
    assert ("Retry-After", "7") in errors.TokenUnavailable("x", 7).rendered()[1]


@pytest.mark.parametrize(
    "message",
    ["", '"quoted" \\ \r\n\0', "é € 😀", "\udcff", "<script>alert(1)</script>", "x" * 10000],
)
def test_any_message_is_valid_json_in_ascii(message):
    _, fields, body = errors.NotFound(message).rendered()
    assert json.loads(body)["error"]["message"] == message and body.isascii()
    assert dict(fields)["Content-Length"] == str(len(body))


def test_further_headers_follow_those_of_the_class_and_belong_to_one_refusal():
    refusal = errors.ClientTimeout("x", headers=(("A", "1"), ("B", "2")))
    assert refusal.rendered()[1][-3:] == [("x-should-retry", "false"), ("A", "1"), ("B", "2")]
    assert errors.ClientTimeout("x").rendered()[1][-1] == ("x-should-retry", "false")


def test_an_outside_end_of_a_request_is_no_refusal_and_no_error_of_a_command():
    for kind in (errors.ClientGone, errors.UpstreamBroken):
        assert not issubclass(kind, errors.Error)


def test_only_a_502_that_repeats_no_paid_work_may_be_retried():
    for may_retry, value in ((True, "true"), (False, "false")):
        assert ("x-should-retry", value) in errors.UpstreamUnreachable(
            "gone", may_retry=may_retry
        ).rendered()[1]


# commands in messages

PRINTS = '#!/bin/sh\necho "$0 $*"\n'


class Installed:
    """A package with errors.py only, and its commands, which print their own command line."""

    def __init__(self, package: Path, commands: Path):
        self.commands = commands
        (package / "xaiproxy").mkdir(parents=True)
        (package / "xaiproxy" / "__init__.py").touch()
        shutil.copy(errors.__file__, package / "xaiproxy" / "errors.py")
        self.environ = {"PATH": os.defpath, "PYTHONPATH": str(package)}
        commands.mkdir(parents=True)
        for name in ("xai-login", "xai-proxy", "xai-serve"):
            (commands / name).write_text(PRINTS)
            (commands / name).chmod(0o755)

    def typed(self, cwd: Path, terminal: bool = False, **environ: str) -> str:
        """The command that a message of this installation names, in a process started as xai-proxy."""
        controller, tty = os.openpty()
        code = (
            f"import sys; sys.argv = [{str(self.commands / 'xai-proxy')!r}]\n"
            "from xaiproxy import errors\n"
            "print(errors.typed('xai-login --device'), errors.SIGN_IN, errors.SERVE, sep='\\n')"
        )
        output = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=self.environ | environ,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=tty if terminal else None,
            check=True,
        ).stdout.splitlines()
        os.close(controller)
        os.close(tty)
        assert output[1] == f"run {output[0]} to sign in" and output[0][0] == output[0][-1] == "`"
        self.serve = output[2]
        return output[0][1:-1]


def in_a_new_shell(line: str, cwd: Path, path: str = os.defpath) -> str:
    return subprocess.run(
        ["sh", "-c", line], env={"PATH": path}, cwd=cwd, text=True, capture_output=True, check=True
    ).stdout


def test_from_a_checkout_a_message_names_the_script_in_bin(tmp_path):
    checkout = Installed(tmp_path / "a checkout", tmp_path / "a checkout" / "bin")
    here = checkout.typed(tmp_path / "a checkout", terminal=True)
    assert here == "bin/xai-login --device"
    assert in_a_new_shell(here, tmp_path / "a checkout") == "bin/xai-login --device\n"
    assert checkout.serve == "`bin/xai-serve`"
    # A log or a client's error is read elsewhere.
    assert checkout.typed(tmp_path / "a checkout") == f"'{checkout.commands}/xai-login' --device"
    # With or without the environment, in another folder: with the checkout's path.
    elsewhere = checkout.typed(
        tmp_path, PATH=f"{checkout.commands}:{os.defpath}", VIRTUAL_ENV=str(tmp_path)
    )
    assert in_a_new_shell(elsewhere, Path("/")) == f"{checkout.commands}/xai-login --device\n"
    assert checkout.serve == f"`'{tmp_path}/a checkout/bin/xai-serve'`"


def test_an_installed_command_is_named_so_that_a_new_shell_finds_it(tmp_path):
    installed = Installed(tmp_path / "site", tmp_path / "a venv" / "bin")
    path = f"{installed.commands}:{os.defpath}"
    on_path = installed.typed(tmp_path, PATH=path)
    assert on_path == "xai-login --device" and installed.serve == "`xai-serve`"
    assert in_a_new_shell(on_path, tmp_path, path) == f"{installed.commands}/xai-login --device\n"
    # On PATH in this shell only, or not at all.
    for environ in ({"PATH": path, "VIRTUAL_ENV": str(tmp_path / "a venv")}, {}):
        line = installed.typed(tmp_path, **environ)
        assert in_a_new_shell(line, tmp_path) == f"{installed.commands}/xai-login --device\n"


def test_a_message_can_be_made_in_a_deleted_working_directory(tmp_path):
    checkout = Installed(tmp_path / "checkout", tmp_path / "checkout" / "bin")
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.rmdir({str(gone)!r}); from xaiproxy import errors; print(errors.SIGN_IN)"
    output = subprocess.run(
        [sys.executable, "-c", code], env=checkout.environ, cwd=gone, text=True, capture_output=True
    )
    assert (output.stdout, output.stderr) == (
        f"run `{checkout.commands}/xai-login --device` to sign in\n",
        "",
    )
