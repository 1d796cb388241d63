"""The two jars that SPICE needs and no Python package includes: search and download.

They are Stanford CoreNLP 3.6.0 and its models, both GPL-3.0. The folder that `RLGF_CORENLP` names
and the cache folder are searched, nothing else.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rlgf.data.files import atomic_write
from rlgf.errors import ConfigError
from rlgf.untrusted_text import escape_control_characters

VARIABLE = "RLGF_CORENLP"
MAVEN_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.5.0"
PIECE = 1 << 20  # bytes per read


@dataclass(frozen=True)
class Jar:
    """A file by its Maven coordinates, and its accepted SHA-256 sums."""

    group: str
    artifact: str
    version: str
    classifier: str
    sums: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the file name."""
        return "-".join(part for part in (self.artifact, self.version, self.classifier) if part) + ".jar"

    @property
    def path(self) -> str:
        """Return the path inside a Maven repository."""
        return f"{self.group.replace('.', '/')}/{self.artifact}/{self.version}/{self.name}"

    @property
    def coordinates(self) -> str:
        """Return the coordinates as Maven's commands take them."""
        return ":".join(part for part in (self.group, self.artifact, self.version, "jar", self.classifier) if part)


JARS = (
    Jar(
        "edu.stanford.nlp", "stanford-corenlp", "3.6.0", "",
        ("d341d5863276f55782c5ef73212222d6b3b48e02ae1951ab6de7618d28b12742",),
    ),
    Jar(
        "edu.stanford.nlp", "stanford-corenlp", "3.6.0", "models",
        (
            "d285157bd7887ee3018094b5dbae092e49088b023361ccdb550ee1daf9b2c9bd",
            # only the files that SPICE opens
            "a563f853548611a1b9626885b21a5c78064ba795ce72fd0b22448c76fd361d65",
        ),
    ),
)  # fmt: skip


def cache_folder() -> Path:
    """Return the folder of downloaded and computed files.

    It is `$XDG_CACHE_HOME/rlgf`, by default `~/.cache/rlgf`.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "rlgf"


def folders() -> list[Path]:
    """Return the folders in which the jars are searched."""
    named = os.environ.get(VARIABLE)
    return [*([Path(named).expanduser().absolute()] if named else []), cache_folder() / "corenlp"]


def find() -> list[Path]:
    """Return the paths of SPICE's jars; raise `ConfigError` unless a folder has both."""
    for folder in folders():
        paths = [folder / jar.name for jar in JARS]
        if all(path.is_file() for path in paths):
            return paths
    names = " and ".join(jar.name for jar in JARS)
    places = " nor in ".join(str(folder) for folder in folders())
    raise ConfigError(
        f"SPICE needs {names}, which are not in {places}: run `rlgf download spice`, or set {VARIABLE} "
        "to a folder that has them."
    )


def fetch(source: str | None, report: Callable[[str], None]) -> Path:
    """Download the jars into the cache folder, verify them, and return the folder.

    `source` is a folder or the address of a Maven repository, or of a folder with the jars; None:
    `mvn` is run. A jar that exists with the right sum is kept. Files are written atomically.
    Raises `ConfigError` for a jar that cannot be downloaded or has a wrong sum.
    """
    target = cache_folder() / "corenlp"
    target.mkdir(parents=True, exist_ok=True)
    for jar in JARS:
        if (target / jar.name).is_file() and _sum_of(target / jar.name) in jar.sums:
            report(f"{jar.name} already exists")
            continue
        with atomic_write(target / jar.name) as file:
            if source is None:
                _by_maven(jar, file, report)
            else:
                _from_source(jar, source, file, report)
            _check(jar, file, source)
    return target


def _check(jar: Jar, file: BinaryIO, source: str | None) -> None:
    file.flush()
    found = _sum_of(Path(file.name))
    if found not in jar.sums:
        raise ConfigError(
            f"{jar.name} from {source or 'Maven'} has the SHA-256 sum {found}, but should have {' or '.join(jar.sums)}: "
            "it is damaged or another file; download it from elsewhere with --from."
        )


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_source(jar: Jar, source: str, file: BinaryIO, report: Callable[[str], None]) -> None:
    """Copy a jar from a folder or URL: a Maven repository or a flat folder."""
    if "://" not in source:
        folder = Path(source).expanduser()
        found = next((folder / place for place in (jar.path, jar.name) if (folder / place).is_file()), None)
        if found is None:
            raise ConfigError(
                f"{folder} has neither {jar.name} nor {jar.path}: give --from a folder or an address that has it."
            )
        report(f"{jar.name}: copied from {found.parent}")
        with found.open("rb") as original:
            shutil.copyfileobj(original, file, PIECE)
        return
    if "@" in urllib.parse.urlsplit(source).netloc:
        raise ConfigError(
            "--from contains a user name or a password: download the jars by other means, and give --from their folder."
        )
    address = source if source.endswith("/") else source + "/"
    reasons: list[str] = []
    for place in (jar.path, jar.name):
        try:
            _download(address + urllib.parse.quote(place), jar.name, file, report)
            return
        except (OSError, ValueError) as error:  # each protocol raises errors of its own
            refused = isinstance(error, urllib.error.HTTPError)
            reasons.append(str(error if refused else getattr(error, "reason", "") or error) or type(error).__name__)
    raise ConfigError(
        f"{jar.name} cannot be downloaded from {source} ({'; '.join(dict.fromkeys(reasons))}): "
        "give --from the address of a Maven repository, or a folder."
    )


def _download(address: str, name: str, file: BinaryIO, report: Callable[[str], None]) -> None:
    file.seek(0)
    file.truncate()
    with urllib.request.urlopen(address, timeout=60) as response:
        length = int(response.headers.get("Content-Length") or 0)
        size = f"{length / 1e6:,.0f} MB" if length else "size unknown"
        report(f"{name}: {size} from {address}")
        done, shown = 0, 0
        while piece := response.read(PIECE):
            file.write(piece)
            done += len(piece)
            if length and (tenths := 10 * done // length) > shown and length > 50 * PIECE:
                shown = tenths
                report(f"{name}: {10 * tenths} %")
        if length and done != length:
            raise OSError(f"the connection ended after {done:,} of {length:,} bytes")


def _by_maven(jar: Jar, file: BinaryIO, report: Callable[[str], None]) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ConfigError(
            "`mvn` is not installed, which would fetch SPICE's jars from Maven Central: install Maven, or give --from the "
            "address of a Maven repository or a folder that has the jars."
        )
    report(f"{jar.name}: downloading {jar.coordinates} with Maven")
    with tempfile.TemporaryDirectory() as folder:
        wanted = [f"-Dartifact={jar.coordinates}", f"-DoutputDirectory={folder}"]
        command = [maven, "-B", "-q", "-Dstyle.color=never", f"{MAVEN_PLUGIN}:copy", *wanted]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
        copied = Path(folder) / jar.name
        if done.returncode or not copied.is_file():
            lines = done.stdout.splitlines()
            errors = [line[line.index("[ERROR]") :] for line in lines if "[ERROR]" in line] or lines or ["nothing"]
            raise ConfigError(
                f"Maven could not download {jar.coordinates} ({escape_control_characters(errors[0][:300])}): "
                "give --from the address of a repository that can be reached, or a folder that has the jars."
            )
        with copied.open("rb") as original:
            shutil.copyfileobj(original, file, PIECE)
