"""Checksums: identities of inputs, manifests of folders, and JSON files that check themselves.

Checksums are SHA-256 in hexadecimal.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Container, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from rlgf.data.files import render_json, write_json
from rlgf.errors import DataError
from rlgf.types import FORMAT_VERSION

MANIFEST = "manifest.json"
MANIFEST_KEYS = {"format_version", "files", "checksum"}
SETTLED_SECONDS = 2  # a file changed later than this may change again within one tick of its clock
SHORT = 16  # hexadecimal digits of a checksum that only identifies


class DamagedError(DataError):
    """A file or folder that is not as it was written."""


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Return a short hash of all inputs of a stage or a run."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:12]


def content_identity(source: str | None) -> Any:
    """Return the identity of a data source or model.

    For a local file or folder it is the name and content hash of every file, otherwise the name. A
    folder with a manifest of this library is identified by the checksums in it, which are verified
    on load, and by the content of files that were added to it; names that begin with a dot do not
    count. Raises `DataError` if the manifest is damaged or missing in a run's folder.
    """
    path = Path(source).expanduser() if source else None
    if path is None or not os.path.exists(path):  # False for a text that is no name, such as a template
        return source
    if path.is_file():
        return [(path.name, file_checksum(path)[:SHORT])]
    if _needs_manifest(path):
        try:
            files: Mapping[str, Any] = _read_manifest(path)["files"]
        except DamagedError as error:
            raise DataError(f"'{source}' is damaged ({error}): restore it, or make it again.") from None
        listed = [(Path(name).name, files[name]["sha256"][:SHORT]) for name in sorted(files)]
        return listed + [(file.name, file_checksum(file)[:SHORT]) for file in _added_files(path, files)]
    files_here = sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name, file_checksum(file)[:SHORT]) for file in files_here]


def _added_files(folder: Path, listed: Container[str]) -> list[Path]:
    """Return the files of a folder that its manifest does not list."""
    names = {file: file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()}
    return [file for file, name in names.items() if name not in listed and name != MANIFEST and not f"/{name}".count("/.")]


def file_checksum(file: Path) -> str:
    """Return the checksum of a file's content; an unchanged file is read once per process."""
    status = file.stat()
    if time.time() - status.st_mtime < SETTLED_SECONDS:
        return read_checksum(file)
    return _file_checksum(str(file), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _file_checksum(file: str, size: int, changed: int) -> str:
    return read_checksum(Path(file))


def read_checksum(file: Path) -> str:
    """Read a file and return the checksum of its content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Write size and checksum of every file in a folder, and flush all to disk.

    `about` are further entries of the manifest.
    """
    files: dict[str, Any] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST):
        _sync(file)
        files[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": read_checksum(file)}
    write_checked_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **about, "files": files})
    for path in {file.parent for file in folder.rglob("*")}:
        _sync(path)


def verify_manifest(folder: Path, checksum: Callable[[Path], str] = read_checksum) -> dict[str, Any]:
    """Compare every file of a folder with its manifest, and return the manifest.

    Raises `DamagedError` for the first file that differs. Files that the manifest does not list are
    ignored.
    """
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        if file.stat().st_size != expected["size"]:
            raise DamagedError(f"{file} has {file.stat().st_size:,} bytes instead of {expected['size']:,}")
        if checksum(file) != expected["sha256"]:
            raise DamagedError(f"the checksum of {file} differs from that in {MANIFEST}")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Load the manifest of a folder; raise `DamagedError` if it is missing or damaged."""
    if not (folder / MANIFEST).is_file():
        raise DamagedError(f"{folder / MANIFEST} is missing")
    manifest = read_checked_json(folder / MANIFEST)
    files: Any = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, cast("dict[str, Any]", files).values())):
        raise DamagedError(f"{folder / MANIFEST} is no manifest of this rlgf")
    return manifest


def _needs_manifest(folder: Path) -> bool:
    """Return whether a folder must pass the check of its manifest.

    Only the models of a run always have one; other folders may hold a file of that name in another
    format, or none.
    """
    is_model_of_run = folder.name in ("policy", "best-policy") or folder.name.startswith("critic-")
    if is_model_of_run and all((folder.parent / name).is_file() for name in ("config.yaml", "identity.json")):
        return True
    if not (folder / MANIFEST).is_file():
        return False
    content = (folder / MANIFEST).read_bytes()
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError):
        return not content.strip(b"\0 \n") or any(f'"{key}"'.encode() in content for key in MANIFEST_KEYS)
    return isinstance(found, dict) and len(MANIFEST_KEYS & cast("dict[str, Any]", found).keys()) > 1  # one may be damaged


def _is_entry(entry: Any) -> bool:
    """Return whether a value is a valid manifest entry of a file."""
    return isinstance(entry, dict) and {"size", "sha256"} <= cast("dict[str, Any]", entry).keys()


def verify_folder(folder: str) -> None:
    """Verify a model's folder if it has a manifest; raise `DataError` if it is damaged.

    A model in a run's folder must have one.
    """
    path = Path(folder).expanduser()
    if not path.is_dir() or not _needs_manifest(path):
        return
    try:
        verify_manifest(path, file_checksum)  # several loads of one folder read it once
    except DamagedError as error:
        raise DataError(f"'{folder}' is damaged ({error}): restore it, or make it again.") from None


def replace_folder(folder: Path, scratch: Path) -> None:
    """Rename the finished folder `scratch` to `folder`, in place of an earlier one.

    Both are in the same parent. The entry is flushed to disk before the earlier one is removed.
    """
    scratch.chmod(0o755)
    old = scratch.with_name(f"{scratch.name}-replaced")
    if folder.exists():
        os.rename(folder, old)
    os.rename(scratch, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_checked_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; its last entry is a checksum of the others."""
    plain = json.loads(json.dumps(value))
    write_json(path, {**plain, "checksum": _object_checksum(plain)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Load a JSON object and verify its checksum; raise `DamagedError` if it differs."""
    try:
        text = path.read_text(encoding="utf-8")
        found: Any = json.loads(text)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{path} is not valid JSON") from None
    if not isinstance(found, dict) or "checksum" not in found:
        raise DamagedError(f"{path} has no checksum")
    value = cast("dict[str, Any]", found)
    intact = text == render_json(value)
    if value.pop("checksum") != _object_checksum(value) or not intact:
        raise DamagedError(f"the checksum in {path} differs from its content")
    return value


def _object_checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder so that nothing reads it; return the path."""
    number = 1
    while (aside := path.with_name(f"damaged-{number}-{path.name}")).exists():
        number += 1
    os.rename(path, aside)
    return aside
