"""The Java process, with a stand-in for Java, and the download of SPICE's jars."""

import functools
import hashlib
import http.server
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlgf.cli.app import app
from rlgf.errors import ConfigError, TrainingError
from rlgf.text_metrics import jars, java
from rlgf.text_metrics.jars import Jar
from rlgf.text_metrics.java import Java

STAND_IN = """
import json, os, sys
print(json.dumps({START}), flush=True)
print("Java says hello", file=sys.stderr, flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if question["operation"] == "die":
        print("out of memory", file=sys.stderr, flush=True)
        os._exit(1)
    if question["operation"] == "die_once" and not os.path.exists(question["mark"]):
        open(question["mark"], "w").close()
        os._exit(1)
    if question["operation"] == "fail":
        print(json.dumps({"error": "NullPointerException: oh"}), flush=True)
    elif question["operation"] == "shout":
        print("x" * 10_000_000, file=sys.stderr)
        print(json.dumps({"result": "done"}), flush=True)
    else:
        print(json.dumps({"result": [os.getpid(), question.get("text")]}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Java]]:
    """A handle whose worker is the stand-in, which says the given line first."""
    handles: list[Java] = []

    def make(start: str = '{"ready": "17"}') -> Java:
        (tmp_path / "worker.py").write_text(STAND_IN.replace("{START}", start))
        monkeypatch.setattr(java, "WORKER", tmp_path / "worker.py")
        handles.append(Java())
        return handles[-1]

    yield make
    for handle in handles:
        handle.close()


def test_one_process_answers_all_questions_and_ends_when_closed(stand_in: Callable[..., Java]) -> None:
    handle = stand_in()
    handle.start()
    assert handle.version == "17"
    first, text = handle.request("echo", text="a\ud800\nb")
    assert text == "a\ud800\nb"
    assert handle.request("echo")[0] == first
    assert handle.request("shout") == "done"
    handle.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert handle.request("echo")[0] != first  # asked again, it is started again


def test_a_worker_that_was_killed_between_questions_is_started_again(stand_in: Callable[..., Java]) -> None:
    handle = stand_in()
    first = handle.request("echo")[0]
    os.kill(first, signal.SIGKILL)
    assert handle.request("echo")[0] != first


def test_a_worker_that_dies_of_a_question_is_asked_once_more(stand_in: Callable[..., Java], tmp_path: Path) -> None:
    handle = stand_in()
    assert handle.request("die_once", mark=str(tmp_path / "mark"), text="a")[1] == "a"
    with pytest.raises(
        TrainingError, match=r"the Java process crashed twice at the same operation \(die\); its last output: .*out of memory"
    ):
        handle.request("die")
    assert handle.request("echo", text="a")[1] == "a"


def test_a_failure_in_java_is_an_error_and_the_worker_stays(stand_in: Callable[..., Java]) -> None:
    handle = stand_in()
    first = handle.request("echo")[0]
    with pytest.raises(TrainingError, match=r"the Java process failed at an operation \(fail\): NullPointerException: oh"):
        handle.request("fail")
    assert handle.request("echo")[0] == first


def test_threads_get_their_own_answers(stand_in: Callable[..., Java]) -> None:
    handle = stand_in()
    answers: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: handle.request("echo", text=str(n))[1]})) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(8)}


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            '{"failed": "none was found"}',
            "Java 11 or newer is needed for these metrics, but none was found: install one (`apt install",
        ),
        (
            '{"failed": "the one found is 1.8.0"}',
            "Java 11 or newer is needed for these metrics, but the one found is 1.8.0: install",
        ),
        ('sys.exit("no heap")', "the Java process crashed at startup; its last output: no heap"),
    ],
)
def test_java_that_is_missing_too_old_or_does_not_start(stand_in: Callable[..., Java], start: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stand_in(start).start()
    assert str(caught.value).startswith(message)


# --- the jars of SPICE ------------------------------------------------------------------------------------------------

CONTENT = {"": b"the parser" * 1000, "models": b"its models" * 1000}


def jar(classifier: str) -> Jar:
    return Jar("edu.example", "parser", "1.0", classifier, ("0" * 64, hashlib.sha256(CONTENT[classifier]).hexdigest()))


@pytest.fixture(autouse=True)
def small_jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small jars instead of CoreNLP's, and a cache folder of our own, which is returned."""
    monkeypatch.setattr(jars, "JARS", (jar(""), jar("models")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(jars.VARIABLE, raising=False)
    return tmp_path / "cache" / "rlgf" / "corenlp"


def repository(folder: Path, flat: bool, harm: str = "") -> Path:
    """A folder with the jars, flat or laid out as Maven does."""
    for each in (jar(""), jar("models")):
        path = folder / (each.name if flat else each.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT[each.classifier] + harm.encode())
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_names_paths_and_coordinates_are_mavens() -> None:
    models = jar("models")
    assert models.name == "parser-1.0-models.jar"
    assert models.path == "edu/example/parser/1.0/parser-1.0-models.jar"
    assert models.coordinates == "edu.example:parser:1.0:jar:models"
    assert jar("").coordinates == "edu.example:parser:1.0:jar"


def test_jars_are_looked_for_in_the_variable_then_in_the_cache(
    tmp_path: Path, small_jars: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as caught:
        jars.find()
    assert str(caught.value) == (
        f"SPICE needs parser-1.0.jar and parser-1.0-models.jar, which are not in {small_jars}: run "
        "`rlgf download spice`, or set RLGF_CORENLP to a folder that has them."
    )
    monkeypatch.setenv(jars.VARIABLE, str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match=f"which are not in {tmp_path}/mine nor in {small_jars}"):
        jars.find()
    repository(small_jars, flat=True)
    assert jars.find()[0].parent == small_jars
    repository(tmp_path / "mine", flat=True)
    assert [path.name for path in jars.find()] == ["parser-1.0.jar", "parser-1.0-models.jar"]
    assert jars.find()[0].parent == tmp_path / "mine"


@pytest.mark.parametrize("flat", [True, False])
def test_fetching_from_a_folder(tmp_path: Path, small_jars: Path, flat: bool) -> None:
    source = repository(tmp_path / "source", flat)
    ran = CliRunner().invoke(app, ["download", "spice", "--from", str(source)])
    assert ran.exit_code == 0, ran.output
    assert {path.name: path.read_bytes() for path in small_jars.iterdir()} == {
        "parser-1.0.jar": CONTENT[""],
        "parser-1.0-models.jar": CONTENT["models"],
    }
    (small_jars / "parser-1.0.jar").write_bytes(b"harmed")
    said: list[str] = []
    assert jars.fetch(str(source), said.append) == small_jars
    assert said[0].startswith("parser-1.0.jar: copied from")
    assert said[1] == "parser-1.0-models.jar already exists"
    assert jars.find()[0].read_bytes() == CONTENT[""]


@pytest.mark.parametrize("flat", [True, False])
def test_fetching_from_an_address(served: tuple[Path, str], small_jars: Path, flat: bool) -> None:
    repository(served[0], flat)
    said: list[str] = []
    jars.fetch(served[1], said.append)
    assert [path.read_bytes() for path in jars.find()] == [CONTENT[""], CONTENT["models"]]
    assert said == [f"{each.name}: 0 MB from {served[1]}/{each.name if flat else each.path}" for each in jars.JARS]


def test_a_wrong_sum_leaves_nothing_behind(tmp_path: Path, served: tuple[Path, str], small_jars: Path) -> None:
    repository(served[0], flat=True, harm="x")
    for source in (served[1], str(served[0])):
        with pytest.raises(ConfigError, match=r"parser-1.0.jar from .* has the SHA-256 sum .*, but should have 0000"):
            jars.fetch(source, lambda line: None)
        assert list(small_jars.iterdir()) == []


def test_a_source_that_has_nothing(tmp_path: Path, served: tuple[Path, str], small_jars: Path) -> None:
    with pytest.raises(ConfigError, match=r"has neither parser-1.0.jar nor edu/example/parser/1.0/parser-1.0.jar"):
        jars.fetch(str(tmp_path / "nothing"), lambda line: None)
    with pytest.raises(
        ConfigError, match=r"parser-1.0.jar cannot be downloaded from http://127.0.0.1:\d+ \(.*404.*\): give --from"
    ):
        jars.fetch(served[1], lambda line: None)
    with pytest.raises(ConfigError, match=r"cannot be downloaded from http://127.0.0.1:1/x \(.*refused.*\)"):
        jars.fetch("http://127.0.0.1:1/x", lambda line: None)
    with pytest.raises(ConfigError, match="--from contains a user name or a password") as caught:
        jars.fetch("http://me:secret@127.0.0.1:1/x", lambda line: None)
    assert "secret" not in str(caught.value)
    assert list(small_jars.iterdir()) == []


def test_a_transfer_that_breaks_off_is_an_error(tmp_path: Path, small_jars: Path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None: ...

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(ConfigError, match="the connection ended after 4 of 1,000 bytes"):
            jars.fetch(f"http://127.0.0.1:{server.server_port}", lambda line: None)
        server.shutdown()
    assert list(small_jars.iterdir()) == []


def maven(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for `mvn`."""
    folder.mkdir()
    (folder / "mvn").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "mvn").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_maven_copies_by_coordinates(tmp_path: Path, small_jars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = repository(tmp_path / "source", flat=True)
    calls = tmp_path / "calls"
    script = f"""echo "$@" >> {calls}
for each in "$@"; do case "$each" in
  -DoutputDirectory=*) out="${{each#*=}}";;
  -Dartifact=*:models) name=parser-1.0-models.jar;;
  -Dartifact=*) name=parser-1.0.jar;;
esac; done
cp {source}/$name $out/"""
    maven(tmp_path / "bin", script, monkeypatch)
    jars.fetch(None, lambda line: None)
    assert [path.read_bytes() for path in jars.find()] == [CONTENT[""], CONTENT["models"]]
    first = calls.read_text().splitlines()[0]
    assert "maven-dependency-plugin:3.5.0:copy -Dartifact=edu.example:parser:1.0:jar -DoutputDirectory=" in first


def test_maven_that_fails_or_is_not_installed(tmp_path: Path, small_jars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maven(tmp_path / "bin", "echo '[ERROR] Unknown host'; exit 1", monkeypatch)
    with pytest.raises(ConfigError, match=r"Maven could not download edu.example:parser:1.0:jar \(\[ERROR\] Unknown host\)"):
        jars.fetch(None, lambda line: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"`mvn` is not installed, .* or give --from"):
        jars.fetch(None, lambda line: None)
    assert list(small_jars.iterdir()) == []


def test_only_spice_can_be_fetched() -> None:
    assert CliRunner().invoke(app, ["download", "corenlp"]).exit_code == 1
    with pytest.raises(ConfigError, match="unknown download 'corenlp': choose from: spice"):
        CliRunner().invoke(app, ["download", "corenlp"], catch_exceptions=False)


def test_the_sums_of_the_real_jars() -> None:
    by_name = {each.name: each.sums for each in REAL_JARS}
    assert list(by_name) == ["stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"]
    assert all(len(digest) == 64 for sums in by_name.values() for digest in sums)
    assert json.dumps(by_name).count("d285157bd7887ee3018094b5dbae092e49088b023361ccdb550ee1daf9b2c9bd") == 1


REAL_JARS = jars.JARS
