"""Settings in .env: which lines are read, and which files are refused."""

import os
import subprocess
import sys

import pytest
from checkout import ROOT

from xaiproxy import config, errors

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a file to another user"
)


def settings(dotenv_path=os.devnull):
    return config.from_environ({"HOME": "/home/me"}, dotenv_path=dotenv_path)


def test_dotenv_values_are_not_expanded(tmp_path):
    (tmp_path / "env").write_text(
        "export XAI_PROXY_SCOPE='a b'  # a note\nXAI_PROXY_CLIENT_ID=${HOME}\nXAI_PROXY_PORT\n"
    )
    chosen = settings(dotenv_path=str(tmp_path / "env"))
    assert (chosen.scope, chosen.client_id, chosen.port) == ("a b", "${HOME}", 9090)


def test_a_byte_order_mark_does_not_hide_the_first_setting(tmp_path):
    (tmp_path / "env").write_bytes(b"\xef\xbb\xbfXAI_PROXY_PORT=77\n")
    assert settings(dotenv_path=str(tmp_path / "env")).port == 77


def test_dotenv_is_read_in_the_working_directory(tmp_path):
    (tmp_path / ".env").write_text("XAI_PROXY_PORT=77\n")
    code = "import os; from xaiproxy import config; print(config.from_environ(os.environ).port)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "HOME": "/"},
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"77\n"


def test_a_dotenv_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "env").write_bytes(b"XAI_PROXY_PORT=\xff\n")
    with pytest.raises(
        errors.ConfigurationError,
        match=f"{tmp_path}/env cannot be read: XAI_PROXY_PORT is not UTF-8",
    ):
        settings(dotenv_path=str(tmp_path / "env"))


@pytest.mark.parametrize(
    "text, line, name",
    [
        ('XAI_PROXY_TOKEN_PATH="/x/t.json\nOTHER=1\n', 1, "TOKEN_PATH"),
        ("A=1\n\n# a\n\nXAI_PROXY_PORT 29555\n", 5, "PORT"),
        ("XAI_PROXY_SCOPE='a' b\r\n", 1, "SCOPE"),
        ('A=1\r\n\r\nXAI_PROXY_BIND="x\r\nXAI_PROXY_PORT="1"\r\n', 3, "BIND"),
    ],
)
def test_a_line_of_dotenv_that_does_not_parse_is_an_error(tmp_path, text, line, name):
    path = tmp_path / "env"
    path.write_bytes(text.encode())
    with pytest.raises(errors.ConfigurationError) as caught:
        settings(dotenv_path=str(path))
    assert str(caught.value) == (
        f"{path} line {line} does not parse: write XAI_PROXY_{name}=VALUE, and close every quote"
    )
    # The unclosed quote of BIND includes another setting.
    assert caught.value.setting == (None if name == "BIND" else f"XAI_PROXY_{name}")


def test_lines_of_another_program_in_dotenv_are_ignored(tmp_path, caplog):
    path = tmp_path / "env"
    path.write_bytes(b'NAME=J\xfcrgen\nSECRET "x\nXAI_PROXY_PORT=77  # sch\xf6n\n')
    assert settings(dotenv_path=str(path)).port == 77 and not caplog.records


@needs_root
def test_a_dotenv_of_another_user_is_refused(tmp_path):
    path = tmp_path / "env"
    path.write_text("XAI_PROXY_ISSUER=https://evil.example\n")
    os.chown(path, 12345, 0)
    with pytest.raises(
        errors.ConfigurationError,
        match=f"{path} belongs to user 12345, and this process runs as user 0",
    ):
        settings(dotenv_path=str(path))
    # Every line is of another program.
    path.write_text("DATABASE_URL=x\nHTTPS_PROXY=http://evil.example\n")
    assert settings(dotenv_path=str(path)) == settings()


@needs_root
def test_roots_dotenv_is_read_by_every_user(tmp_path):
    (tmp_path / ".env").write_text("XAI_PROXY_PORT=77\n")
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=12345",
            "--clear-groups",
            "--inh-caps=+dac_override,+dac_read_search",
            "--ambient-caps=+dac_override,+dac_read_search",
            sys.executable,
            "-c",
            "import os; from xaiproxy import config; "
            "print(os.geteuid(), config.from_environ(os.environ).port)",
        ],
        env={"PYTHONPATH": str(ROOT), "HOME": "/"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.stdout == "12345 77\n", done.stderr


def test_a_dotenv_that_every_user_may_write_is_refused(tmp_path):
    path = tmp_path / "env"
    path.write_text("XAI_PROXY_PORT=77\n")
    path.chmod(0o646)
    with pytest.raises(
        errors.ConfigurationError, match=f"{path} is writable by every user.*chmod o-w it"
    ):
        settings(dotenv_path=str(path))
    wrong: list[errors.ConfigurationError] = []
    assert (
        config.from_environ({"HOME": "/home/me"}, dotenv_path=str(path), complain=wrong.append)
        == settings()
    )
    assert len(wrong) == 1


@pytest.mark.parametrize("mode, warned", [(0o600, 0), (0o644, 0), (0o664, 1)])
def test_a_dotenv_that_its_group_may_write_is_read_with_a_warning(tmp_path, mode, warned):
    path = tmp_path / "env"
    path.write_text("XAI_PROXY_PORT=77\n")
    path.chmod(mode)
    chosen = settings(dotenv_path=str(path))
    assert chosen.port == 77 and len(chosen.warnings) == warned
    assert all(f"{path} is writable by its group" in warning for warning in chosen.warnings)
