"""A folder as the kubelet mounts a Secret there: links into a folder that is swapped at once."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path


class MountedSecret:
    """`path`: of the token file. `group`: that may read it; the files are this process's own."""

    def __init__(self, folder: Path, group: int = -1):
        self.path = folder / "tokens.json"
        self._folder, self._group = folder, group
        self._numbers = itertools.count()
        folder.mkdir(mode=0o755)

    def swap(self, content: str) -> None:
        """Replace ..data, as the kubelet does after the Secret has changed."""
        new = self._folder / f"..{next(self._numbers)}"
        new.mkdir(mode=0o755)
        file = new / self.path.name
        file.write_text(content)
        os.chown(file, -1, self._group)
        file.chmod(0o440)
        data, temporary = self._folder / "..data", self._folder / "..data_tmp"
        former = data.resolve() if data.is_symlink() else None
        temporary.symlink_to(new.name)
        os.replace(temporary, data)
        if former is None:
            self.path.symlink_to(f"..data/{self.path.name}")
        else:
            shutil.rmtree(former)
