"""The files that are made from the code, and that bin/generate writes.

conf/xaiproxy.env.example has all settings. Those of conf/share are made from the parsers of the
commands: completions for shells, and man pages. The wheel installs them into share/ of its
environment. The alerts for the Prometheus operator are those of conf/prometheus.
"""

from __future__ import annotations

import argparse
import configparser
import importlib
import shutil
import sys
import textwrap
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage
from checkout import ROOT

from xaiproxy import client_recipes, command, config, console_scripts

SHARE = "conf/share"
COMPLETIONS = {
    "bash": f"{SHARE}/bash-completion/completions/{{}}",
    "zsh": f"{SHARE}/zsh/site-functions/_{{}}",
    "fish": f"{SHARE}/fish/vendor_completions.d/{{}}.fish",
}
ALERTS = "conf/kubernetes/shared/prometheusrule/alerts.yaml"
PROMETHEUS_RULE = """\
# Made from conf/prometheus/rules.yml by bin/generate.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: xaiproxy
spec:
"""
MAN_PAGE = f"{SHARE}/man/man1/{{}}.1"
# By metavar; a client is one of choices.
COMPLETERS = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
KEY_NAMES = "xai-client-key list 2>/dev/null | cut -d ' ' -f 1"


def parsers() -> list[command.ArgumentParser]:
    """Return a parser for each command of setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    names = [
        line.partition(":")[2]
        for line in setup["options.entry_points"]["console_scripts"].split("\n")
        if line
    ]
    scripts = [getattr(console_scripts, name) for name in names]
    return [importlib.import_module(script.args[1]).parser() for script in scripts]


def texts() -> dict[str, str]:
    """Return what each file has to contain, by its path in the checkout."""
    made = {"conf/xaiproxy.env.example": config.example(), ALERTS: prometheus_rule()}
    for parser in parsers():
        made[MAN_PAGE.format(parser.prog)] = man_page(parser)
        complete_arguments(parser)
        for shell, path in COMPLETIONS.items():
            made[path.format(parser.prog)] = shtab.complete(parser, shell) + "\n"
    return made


def prometheus_rule() -> str:
    """Return the alerts as an object of the Prometheus operator."""
    _, start, groups = (ROOT / "conf/prometheus/rules.yml").read_text().partition("groups:\n")
    return PROMETHEUS_RULE + textwrap.indent(start + groups, "  ")


def man_page(parser: command.ArgumentParser) -> str:
    summary = parser.description or ""
    page = Manpage(parser)
    page.description = summary[0].lower() + summary[1:].rstrip(".")
    page.source, page.manual, page.date = "xaiproxy", "xaiproxy", ""
    page.add_section("examples", "=", verbatim(parser.examples))
    page.add_section("notes", "=", (parser.epilog or "").replace("-", r"\-"))
    parser.epilog = None
    return str(page)


def verbatim(text: str) -> str:
    # Quotes and dashes that can be copied into a shell.
    escaped = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    return f".nf\n{textwrap.dedent(escaped).rstrip()}\n.fi"


def complete_arguments(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                complete_arguments(subparser)
        elif action.metavar in COMPLETERS:
            action.complete = COMPLETERS[action.metavar]
        elif action.metavar == "CLIENT":
            action.choices = list(client_recipes.load())
        elif parser.prog.endswith("remove"):
            action.complete = shtab.cmd(KEY_NAMES)


def write(folder: Path) -> None:
    """Write the files below a folder, instead of those that it has."""
    made = texts()
    shutil.rmtree(folder / SHARE, ignore_errors=True)
    for path, text in made.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


# A program of its own, since the module of xai-proxy patches the standard library.
if __name__ == "__main__":
    write(Path(sys.argv[1]))
