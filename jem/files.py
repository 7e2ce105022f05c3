"""Files on any pyarrow filesystem: the local disk, object stores, HDFS.

A `Location` is a filesystem and a path on it. Local writes appear whole or not at all (temporary name,
fsync, rename); object stores give that by themselves.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyarrow import fs as pafs

SAFE = "/=+&'~,:@!$()*;"
"""What stands in a URI's path as it is, besides letters and digits; pyarrow decodes what is written as %XX."""


@dataclass(frozen=True)
class Location:
    """A path on a filesystem; `root / "a" / "b"` goes down."""

    fs: pafs.FileSystem
    path: str
    scheme: str = ""
    query: str = ""  # of the URI, such as an endpoint
    opened_as: str = field(default="", repr=False, compare=False)  # the URI, credentials included

    @classmethod
    def of(cls, uri: str | Path) -> Location:
        """`uri`: a local path (relative to the working directory) or any URI that pyarrow knows.

        Raises ValueError for a scheme that pyarrow does not know.
        """
        text = str(uri)
        if "://" not in text:
            return cls(pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))
        try:
            filesystem, path = pafs.FileSystem.from_uri(_with_whole_writes(text))
        except Exception as error:  # pyarrow raises several types here, all about the URI
            said = f"{text}: not a location that pyarrow can open: {error}"
            raise ValueError(re.sub(r"://[^/@\s]*:[^@\s]*@", "://***@", said)) from None
        local, query = isinstance(filesystem, pafs.LocalFileSystem), text.partition("?")[2]
        if local:
            return cls(filesystem, path)
        region = getattr(filesystem, "region", "")
        if region and "region=" not in text:  # found out over the network, which another process need not ask again
            text += f"{'&' if '?' in text else '?'}region={region}"
        return cls(filesystem, path, text.partition("://")[0], query, text)

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened anew by its URI in another process: pyarrow's own way forgets to retry what a cut connection fails."""
        if not self.opened_as:
            return Location, (self.fs, self.path, self.scheme, self.query)
        return _reopened, (self.opened_as, self.path, self.query)

    def __truediv__(self, name: str | int) -> Location:
        return self._at(f"{self.path.rstrip('/')}/{name}")

    @property
    def uri(self) -> str:
        """An absolute path, or a URI where the path is not local."""
        query = f"?{self.query}" if self.query else ""
        return f"{self.scheme}://{quote(self.path, safe=SAFE)}{query}" if self.scheme else self.path

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        return self._at(self.path.rstrip("/").rsplit("/", 1)[0] or "/")

    @property
    def is_local(self) -> bool:
        return not self.scheme

    @property
    def local(self) -> Path:
        if not self.is_local:
            raise ValueError(f"{self.uri} is not on the local disk")
        return Path(self.path)

    def exists(self) -> bool:
        return bool(self._info().type != pafs.FileType.NotFound)

    def is_dir(self) -> bool:
        return bool(self._info().type == pafs.FileType.Directory)

    def size(self) -> int:
        return int(self._info().size)

    def read(self) -> bytes:
        with self.fs.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, data: bytes) -> None:
        """Write the whole file; a reader never sees half of it, and a crash leaves the old one."""
        if not self.is_local:
            try:
                stream = self.fs.open_output_stream(self.path)
            except FileNotFoundError:  # not an object store, but a filesystem that has folders
                self.parent.mkdir()
                stream = self.fs.open_output_stream(self.path)
            with stream:
                stream.write(data)
            return
        target = self.local
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)  # the rename itself survives a power cut
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def mkdir(self) -> None:
        self.fs.create_dir(self.path, recursive=True)

    def children(self) -> list[Location]:
        """What lies directly below, sorted by name; nothing if this is not a directory."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted((self._at(info.path) for info in infos), key=lambda child: child.path)

    def remove(self) -> None:
        """Delete the file or the whole directory; nothing happens if there is none."""
        info = self._info()
        if info.type == pafs.FileType.Directory:
            self.fs.delete_dir(self.path)
        elif info.type != pafs.FileType.NotFound:
            self.fs.delete_file(self.path)

    def move_to(self, target: Location) -> None:
        """Rename a file or directory; on an object store, copy and then delete."""
        if self.is_local:
            target.local.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.path, target.path)
            return
        (target if self.is_dir() else target.parent).mkdir()
        pafs.copy_files(self.path, target.path, source_filesystem=self.fs, destination_filesystem=target.fs)
        self.remove()

    def _at(self, path: str) -> Location:
        return Location(self.fs, path, self.scheme, self.query, self.opened_as)

    def _info(self) -> Any:
        return self.fs.get_file_info(self.path)


def _reopened(uri: str, path: str, query: str) -> Location:
    return replace(Location.of(uri), path=path, query=query)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _with_whole_writes(uri: str) -> str:
    """Small objects go to S3 in one request instead of the three of a multi-part upload."""
    if not uri.startswith("s3://") or "allow_delayed_open" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def existing(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())
