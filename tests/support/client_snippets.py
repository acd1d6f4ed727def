"""The clients of conf/clients, as the status page has them.

Run as a program, it writes them into the page.
"""

from __future__ import annotations

import json
import re

from checkout import ROOT

PAGE = ROOT / "xaiproxy" / "proxy" / "page.html"
BLOCK = re.compile(r'(?<=<script type="application/json" id="snippets">\n).*?(?=\n</script>)', re.S)
ROW = re.compile(r"\| ([^|]+) \| \[([^\]]+)\]\(\2\) \| ([^|]+) \| [^|]+ \|")


def block() -> str:
    """The clients in the order of conf/clients/README.md, a line of JSON each."""
    folder = ROOT / "conf" / "clients"
    lines = []
    for name, file, use in ROW.findall((folder / "README.md").read_text()):
        client = {"name": name, "file": file, "use": use, "text": (folder / file).read_text()}
        lines.append(json.dumps(client, ensure_ascii=False).replace("<", r"\u003c"))
    return "[\n" + ",\n".join(lines) + "\n]"


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda found: block(), PAGE.read_text()))
