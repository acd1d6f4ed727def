"""How each client of conf/clients is started: the sections of its launch.ini."""

import configparser
import dataclasses
import re
import shlex
import shutil
from pathlib import Path

# In a checkout it is a link to conf/clients, and in an installation a copy.
FOLDER = Path(__file__).with_name("clients")
# In all files of that folder.
ORIGIN = "http://127.0.0.1:9090"
LINK = """\
# Link to the files of a folder, except those that $folder has already.
link() { for path in "$1"/* "$1"/.[!.]*; do
    [ ! -e "$path" ] || [ -e "$folder/${path##*/}" ] || ln -s "$path" "$folder"
done; }
"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A section of launch.ini, which describes its members. `client`: the section's name."""

    client: str
    name: str
    files: str
    install: str
    sets: str
    start: str
    command: str = ""
    prepare: str = ""

    @property
    def is_installed(self) -> bool:
        return shutil.which(self.command or self.client) is not None

    def texts(self, origin: str) -> dict[str, str]:
        """Return the client's files by their names, with the address of the proxy in them."""
        return {
            file: (FOLDER / file).read_text().replace(ORIGIN, origin) for file in self.files.split()
        }

    def script(self, folder: Path) -> str:
        """Return the shell script that starts the client. `folder`: where its files are."""
        setting = f"set -e\nfolder={shlex.quote(str(folder))}\n"
        return f'{setting}{self._prepared()}exec {self.start} "$@"\n'

    def printed(self, origin: str, key: str) -> str:
        """Return a script that does the same by itself. `key`: the line that sets XAIPROXY_KEY."""
        lines = [key, "folder=$(mktemp -d)\n"]
        for file, text in self.texts(origin).items():
            lines.append(f"cat >\"$folder/{file}\" <<'END OF FILE'\n{text}END OF FILE\n")
        return "".join([*lines, self._prepared(), f'{self.start} "$@"\n'])

    def _prepared(self) -> str:
        prepare = self.prepare.strip() + "\n" if self.prepare else ""
        return LINK + prepare if re.search(r"^link ", prepare, re.M) else prepare


def load() -> dict[str, Recipe]:
    """Return the recipes by what is typed, in the order of the file."""
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.read_string((FOLDER / "launch.ini").read_text())
    return {client: Recipe(client, **parser[client]) for client in parser.sections()}
