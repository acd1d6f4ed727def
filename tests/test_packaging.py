"""The promises of a checkout and of an installation: the commands are there, and bin/ makes a .venv
that can be trusted.
"""

import configparser
import contextlib
import http.server
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading

import pytest
from checkout import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from terminal import CTRL_C, Terminal

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
COMMANDS = [
    line.split(" = ")[0]
    for line in SETUP["options.entry_points"]["console_scripts"].split("\n")
    if line
]
SCRIPTS = sorted(path for path in (ROOT / "bin").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_executable(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["sh", "-n", script]).returncode == 0


def test_every_command_works_from_a_checkout():
    assert set(COMMANDS) <= {path.name for path in SCRIPTS}


def test_the_package_imports_nothing_so_that_main_can_patch_first():
    code = (
        "import sys; before = set(sys.modules); import xaiproxy; print(*set(sys.modules) - before)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.stdout.split() == ["xaiproxy"]


CLIENTS = ROOT / "xaiproxy" / "clients"  # a link to data, which rglob does not follow


def package_files():
    return {
        path
        for path in [*(ROOT / "xaiproxy").rglob("*"), *CLIENTS.iterdir()]
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_setup_cfg_names_every_data_file_and_every_folder_is_a_package():
    # Only an installed copy would show that one is missing.
    named = {
        path
        for package, patterns in SETUP["options.package_data"].items()
        for pattern in patterns.split()
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    data = {path for path in package_files() if path.suffix != ".py" or path.parent == CLIENTS}
    assert data == named
    assert all((path.parent / "__init__.py").exists() for path in package_files() - named)


def test_the_wheel_and_the_sdist_have_every_file_of_the_package(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "xaiproxy", tmp_path / "xaiproxy", ignore=ignored)
    # A wheel is what build writes to build/lib; to pack it, older setuptools need another package.
    command = [sys.executable, "setup.py", "build", "sdist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    built = tmp_path / "build" / "lib"
    with tarfile.open(*(tmp_path / "dist").iterdir()) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(ROOT).as_posix() for path in package_files()}
    assert files <= packed
    assert files == {
        path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()
    }


def requirements(section, name):
    return [line for line in SETUP[section][name].split("\n") if line and not line.startswith("#")]


def test_every_requirement_has_a_lower_bound_that_can_be_tested():
    extras = [
        line
        for name in SETUP["options.extras_require"]
        for line in requirements("options.extras_require", name)
    ]
    for line in requirements("options", "install_requires") + extras:
        # The files that these make are in the checkout.
        exact = re.fullmatch(r"(argparse-manpage|shtab)==[0-9.]+", line)
        assert exact or re.fullmatch(r"[A-Za-z0-9-]+(\[[a-z]+\])?>=[0-9.]+(; .*)?", line)


def pins():
    """The image's packages and their versions, each of which has to have a hash."""
    lines = (ROOT / "conf" / "requirements.txt").read_text().replace("\\\n", "").splitlines()
    return dict(
        re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)( +--hash=sha256:[0-9a-f]{64})+", line).group(1, 2)
        for line in lines
        if not line.startswith("#")
    )


def test_the_image_has_exact_versions_that_setup_cfg_allows():
    versions = pins()
    for line in requirements("options", "install_requires"):
        name, bound = line.split(">=")
        assert numbers(versions[name]) >= numbers(bound), line


def test_the_image_has_all_that_its_packages_need():
    # It installs xaiproxy.
    needed = {"setuptools"}
    for name in pins().keys() - needed:
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            if not need.marker or need.marker.evaluate({"extra": ""}):
                needed.add(canonicalize_name(need.name))
    assert needed <= pins().keys()


def numbers(version):
    return [int(number) for number in re.findall("[0-9]+", version)]


# An interpreter that makes a .venv at once. $PIP is what its pip does; each call of it adds a line
# to $CALLS.
PYTHON = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
    -V) echo "Python 3.99.1" ;;
    "-c "*) exec "$REAL" "$@" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "version = 3.99.1" >"$3/pyvenv.cfg" ;;
    "-m pip install "*)
        echo "$*" >>"$CALLS"
        eval "$PIP"
        printf '#!/bin/sh\\necho "$0" "$@"\\n' >"$here/xai-login"
        chmod +x "$here/xai-login" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path / "a checkout")


class Checkout:
    def __init__(self, folder):
        self.folder = folder
        shutil.copytree(ROOT / "bin", folder / "bin")
        shutil.copy(ROOT / "setup.cfg", folder)
        self.python = folder / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        self.calls = folder / "calls"
        self.ran = f"{folder}/.venv/bin/xai-login --status\n"

    def environ(self, pip, environ):
        return {
            "PATH": os.defpath,
            "PYTHON": str(self.python),
            "CALLS": str(self.calls),
            "PIP": pip,
            "REAL": sys.executable,
            **environ,
        }

    def start(self, pip=":", script=None, **environ):
        return subprocess.Popen(
            [script or self.folder / "bin" / "xai-login", "--status"],
            env=self.environ(pip, environ),
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def terminal(self, pip, **environ):
        script = str(self.folder / "bin" / "xai-login")
        return Terminal([script, "--status"], env=self.environ(pip, environ))

    def run(self, pip=":", script=None, **environ):
        with self.start(pip, script, **environ) as process:
            out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def installations(self):
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


def test_a_command_makes_its_venv_once_and_prints_that(checkout):
    code, out, err = checkout.run()
    assert (code, out) == (0, checkout.ran)
    assert "making" in err and "installing" in err
    assert checkout.run() == (0, checkout.ran, "")
    assert checkout.installations() == 1


PIP = """
echo "Collecting flask>=3.0"; echo "  Downloading flask-3.1.3-py3-none-any.whl (103 kB)"
echo "Installing collected packages: click, flask"
"""


def test_an_installation_shows_what_pip_does(checkout):
    err = checkout.run(PIP)[2]
    assert err.endswith("xaiproxy: Installing collected packages: click, flask\n")
    assert "Collecting" not in err and "\x1b" not in err


@pytest.mark.parametrize("term, lines", [("xterm", 3), ("dumb", 0)])
def test_a_terminal_shows_each_line_of_pip_in_place_of_the_last(checkout, term, lines):
    with checkout.terminal(PIP, TERM=term) as terminal:
        assert terminal.end() == 0
    assert terminal.screen.count("\r\x1b[K  ") == lines
    assert ("\r\x1b[K  Downloading flask-3.1.3-" in terminal.screen) == (lines > 0)
    cleared = "\r\x1b[K" if lines else ""
    assert terminal.screen.endswith(f"{cleared}{checkout.ran.strip()}\r\n")


def test_ctrl_c_during_an_installation_is_one_sentence_and_130(checkout):
    pip = "trap 'echo cancelled; exit 2' INT; echo begun >&2; while :; do sleep 0.05; done"
    with checkout.terminal(pip, TERM="dumb") as terminal:
        terminal.expect("begun")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
    assert terminal.screen.endswith(
        "begun\r\n^Cxaiproxy: interrupted; run the same command again\r\n"
    )
    assert checkout.run()[:2] == (0, checkout.ran)


def test_ctrl_c_while_another_command_makes_the_venv(checkout, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with checkout.start(f"cat '{fifo}'") as first:
        with open(fifo, "w"), checkout.terminal("exit 1") as second:
            second.expect("waiting")
            second.type(CTRL_C)
            assert second.end() == 130
        assert first.communicate()[0] == checkout.ran
    assert second.screen.endswith("^Cxaiproxy: interrupted; run the same command again\r\n")


def test_a_command_works_through_a_link_from_another_folder(checkout, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(checkout.folder / "bin" / "xai-login")
    assert checkout.run(script=link)[:2] == (0, checkout.ran)


@pytest.mark.parametrize(
    "environ, seen",
    [
        ({"LC_ALL": "C"}, "C.UTF-8"),
        ({"LC_ALL": "POSIX"}, "C.UTF-8"),
        ({"LC_ALL": "de_DE.UTF-8"}, "de_DE.UTF-8"),
        ({}, ""),
    ],
)
def test_the_locale_of_a_command_can_read_a_path_that_is_not_ascii(checkout, environ, seen):
    """Python reads the folder of the checkout from a .pth file in the locale's encoding."""
    assert checkout.run()[0] == 0
    login = checkout.folder / ".venv" / "bin" / "xai-login"
    login.write_text('#!/bin/sh\necho "${LC_ALL:-}"\n')
    assert checkout.run(**environ)[1] == f"{seen}\n"


def test_a_changed_setup_cfg_is_installed_again(checkout):
    checkout.run()
    with open(checkout.folder / "setup.cfg", "a") as setup:
        setup.write("# another requirement\n")
    assert checkout.run()[0] == 0
    assert checkout.installations() == 2


@pytest.mark.parametrize(
    "now, installations", [("3.100.0", 2), ("4.9.1", 2), ("3.99.2", 1), ("", 2)]
)
def test_a_python_that_was_upgraded_in_place_gets_a_new_venv(checkout, now, installations):
    """.venv/bin/python is a link to it; if the old one was removed, the link is dangling."""
    checkout.run()
    upgraded = PYTHON.replace("3.99.1", now or "3.99.1")
    checkout.python.write_text(upgraded)
    python = checkout.folder / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(checkout.python if now else "/nowhere/python")
    old = checkout.folder / ".venv" / "lib"
    old.mkdir()
    on_path = {"PYTHON": "", "PATH": f"{checkout.folder}/on-path:{os.defpath}"}
    (checkout.folder / "on-path").mkdir()
    (checkout.folder / "on-path" / "python3").symlink_to(checkout.python)
    assert checkout.run(**on_path)[:2] == (0, checkout.ran)
    assert (checkout.installations(), old.exists()) == (installations, installations == 1)
    assert (
        checkout.run(**on_path) == (0, checkout.ran, "")
        and checkout.installations() == installations
    )


def test_a_copied_checkout_does_not_run_the_code_of_the_original(checkout, tmp_path):
    checkout.run()
    copy = tmp_path / "copy"
    shutil.copytree(checkout.folder, copy)
    assert (
        checkout.run(script=copy / "bin" / "xai-login")[1]
        == f"{copy}/.venv/bin/xai-login --status\n"
    )


def test_two_commands_at_once_make_one_venv(checkout, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with checkout.start(f"echo begun >&2; cat '{fifo}'") as first:
        assert "begun\n" in first.stderr
        with open(fifo, "w"):
            second = checkout.start("exit 1")
            assert "waiting" in second.stderr.readline()
        with second:
            assert (first.communicate()[0], second.communicate()[0]) == (checkout.ran, checkout.ran)
    assert checkout.installations() == 1


def test_an_installation_killed_in_the_middle_is_not_trusted(checkout, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    half = f"touch '{checkout.folder}/.venv/half'; printf '#!/bin/sh\\necho half' >\"$here/xai-login\"; "
    with checkout.start(
        f"{half} chmod +x \"$here/xai-login\"; echo begun >&2; cat '{fifo}'; exit 1"
    ) as process:
        assert "begun\n" in process.stderr
        with open(fifo, "w"):
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=30)
    assert (checkout.folder / ".venv" / "half").exists()
    assert checkout.run()[:2] == (0, checkout.ran)
    assert not (checkout.folder / ".venv" / "half").exists()


@pytest.mark.parametrize(
    "pip, environ, sentence",
    [
        ("exit 1", {}, "pip could not install into"),
        (
            ":",
            {"PYTHON": "/nowhere/python"},
            "/nowhere/python is missing, or older than Python 3.10",
        ),
        (":", {"PYTHON": "false"}, "false is missing, or older than Python 3.10"),
    ],
)
def test_a_failed_installation_is_one_sentence(checkout, pip, environ, sentence):
    code, out, err = checkout.run(pip, **environ)
    assert (code, out) == (69, "")
    assert err.splitlines()[-1].startswith(f"xaiproxy: {sentence}")


# bin/smoke, against a server with scripted responses.

MODELS = '{"object":"list","data":[{"id":"grok-image","object":"model"},{"id":"grok-4.5","object":"model"}]}'
STREAM = "".join(
    f'data: {{"choices":[{{"index":0,"delta":{{"content":"{word}"}}}}]}}\n\n'
    for word in ("one ", "two")
)
DONE = "data: [DONE]\n\n"


@contextlib.contextmanager
def endpoint(models=(200, MODELS), stream=(200, STREAM + DONE), key=None):
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, status, body):
            if key and self.headers["Authorization"] != f"Bearer {key}":
                status, body = 401, '{"error":{"message":"a client key is needed"}}'
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self):
            self.answer(*models)

        def do_POST(self):
            seen.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.answer(*stream)

        def log_message(self, *arguments):
            pass

    seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", seen
        finally:
            server.shutdown()
            thread.join()


def smoke(url, **environ):
    environ = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run(
        [ROOT / "bin" / "smoke", url], env=environ, capture_output=True, text=True, timeout=30
    )


needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="bin/smoke needs curl")


@needs_curl
def test_smoke_succeeds_when_models_and_a_stream_are_returned():
    with endpoint() as (url, seen):
        answer = smoke(url)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "2 models" in answer.stdout and answer.stdout.endswith("grok-4.5 answers: one two\n")
    assert '"model":"grok-4.5"' in seen[0]


@needs_curl
def test_smoke_reads_key_and_model_from_the_environment():
    with endpoint(key="secret") as (url, seen):
        assert smoke(url, XAIPROXY_KEY="secret", XAIPROXY_MODEL="grok-image").returncode == 0
        refused = smoke(url)
    assert '"model":"grok-image"' in seen[0]
    assert refused.returncode == 77
    assert "a client key is needed" in refused.stderr and "XAIPROXY_KEY" in refused.stderr


@needs_curl
@pytest.mark.parametrize(
    "answers, sentence",
    [
        ({"models": (503, "not now")}, "answered 503: not now"),
        ({"models": (200, "<html>")}, "without a single model"),
        ({"stream": (200, STREAM)}, "the stream ended before"),
        ({"stream": (200, DONE)}, "the stream ended before"),
        ({"stream": (429, '{"error":"too many"}')}, 'answered 429: {"error":"too many"}'),
    ],
)
def test_smoke_names_what_is_wrong(answers, sentence):
    with endpoint(**answers) as (url, _):
        answer = smoke(url)
    assert answer.returncode == 69
    assert sentence in answer.stderr


@needs_curl
def test_smoke_names_the_command_that_starts_the_proxy():
    with endpoint() as (url, _):
        pass
    answer = smoke(url)
    assert answer.returncode == 69
    assert f"nothing answers at {url}" in answer.stderr and "bin/xai-serve" in answer.stderr
