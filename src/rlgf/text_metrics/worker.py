"""The worker program in which Java runs: the PTB tokenizer, lemmas, METEOR and SPICE.

`java.py` starts this file as a separate process and sends it requests as lines of JSON on standard
input. It imports nothing of this package. Each library has its own class loader, because the
tokenizer and SPICE include different versions of CoreNLP. SPICE is called through its own classes
rather than its command line, which ends the process on bad arguments, loads its models at every
call, cannot store the parse of a text of more than about 500 bytes, and needs a JavaScript engine
to indent its output.
"""

import importlib
import json
import os
import sqlite3
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

MIN_JAVA_VERSION = 11
PARSE_BATCH = 256  # texts per write of their parses
KEPT_PARSES = 50_000  # texts in memory; all are on disk
REQUEST_BATCH = 500  # texts per query of the database
LEMMA_TAGS = ("NNS", "VBD", "JJR")  # as a noun, as a verb, as it is
SYNONYM_FILES = ("exceptions", "synsets", "relations")
METEOR = Path("meteor", "meteor-1.5.jar")
KEEP_PUNCTUATION = 2  # METEOR's option -norm

jpype: Any = None


def main() -> None:
    """Answer requests, one line each, until standard input ends."""
    settings = json.loads(sys.argv[1])
    package = Path(settings["package"])
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # output of Java must not mix with the responses

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        answer(ready=start_java(settings["heap"], package / METEOR))
    except Exception as error:  # the parent process reports it
        answer(failed=str(error))
        return
    libraries = Libraries(package)
    for request in requests():
        try:
            operation: Callable[..., Any] = getattr(libraries, request.pop("operation"))
            answer(result=operation(**request))
        except UnusableFileError as error:
            answer(refused=str(error))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


def requests() -> Iterator[dict[str, Any]]:
    """Yield requests as they arrive on standard input.

    When standard input closes, because the parent has ended, this process exits at once.
    """
    queue: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            queue.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield json.loads(queue.get())


def start_java(heap: str, meteor: Path) -> str:
    """Start Java in this process and return its version.

    METEOR finds its word lists on Java's own class path only. Raises `RuntimeError` if Java is
    missing or too old.
    """
    global jpype
    jpype = importlib.import_module("jpype")
    try:
        jpype.startJVM(f"-Xmx{heap}", "-Djava.awt.headless=true", classpath=[str(meteor)])
    except jpype.JVMNotFoundException as error:
        raise RuntimeError("none was found") from error
    version = str(jpype.java.lang.System.getProperty("java.version"))
    major = int(str(jpype.java.lang.System.getProperty("java.specification.version")).removeprefix("1.").split(".")[0])
    if major < MIN_JAVA_VERSION:
        raise RuntimeError(f"the one found is {version}")
    return version


class UnusableFileError(Exception):
    """A file that cannot be read or written; the message is for users."""


class Libraries:
    """The Java libraries, each loaded on first use."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.loaders: dict[tuple[Path, ...], Any] = {}
        self.meteor_scorer: Any = None
        self.spice_scorer: Spice | None = None

    def java_class(self, name: str, *jars: Path) -> Any:
        """Load a class from the given jars."""
        if jars not in self.loaders:
            urls = [jpype.JClass("java.io.File")(str(jar)).toURI().toURL() for jar in jars]
            self.loaders[jars] = jpype.JClass("java.net.URLClassLoader")(jpype.JArray(jpype.JClass("java.net.URL"))(urls))
        return jpype.JClass(name, loader=self.loaders[jars])

    def tokenizer_class(self, name: str) -> Any:
        """Load a class of the CoreNLP version with coco-caption's tokenizer."""
        return self.java_class(name, self.package / "tokenizer" / "stanford-corenlp-3.4.1.jar")

    def tokens(self, texts: Sequence[str]) -> list[str]:
        """Return the tokens of each text in lower case, joined by spaces.

        These are the tokens that the tokenizer's command line prints. Every text is tokenized
        separately, so none can move into the line of another or change its tokens.
        """
        tokenizer = self.tokenizer_class("edu.stanford.nlp.process.PTBTokenizer")
        joined = self.tokenizer_class("edu.stanford.nlp.util.StringUtils")
        reader, english = jpype.JClass("java.io.StringReader"), jpype.JClass("java.util.Locale").ENGLISH
        return [
            str(joined.join(tokenizer.newPTBTokenizer(reader(text)).tokenize(), " ").toLowerCase(english)) for text in texts
        ]

    def lemmas(self, words: Sequence[str]) -> list[list[str]]:
        """Return each word's lemmas: as a noun, as a verb, and the word itself."""
        morphology = self.tokenizer_class("edu.stanford.nlp.process.Morphology")()
        return [sorted({str(morphology.lemma(word, tag)) for tag in LEMMA_TAGS}) for word in words]

    def meteor(self, lines: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Any]:
        """Compute METEOR of each (tokenized text, tokenized references), and of the corpus."""
        if self.meteor_scorer is None:
            configuration = jpype.JClass("edu.cmu.meteor.scorer.MeteorConfiguration")()
            configuration.setLanguage("en")
            configuration.setNormalization(KEEP_PUNCTUATION)
            self.meteor_scorer = jpype.JClass("edu.cmu.meteor.scorer.MeteorScorer")(configuration)
        all_lines = jpype.JClass("edu.cmu.meteor.scorer.MeteorStats")()
        scores: list[float] = []
        for text, references in lines:
            statistics = self.meteor_scorer.getMeteorStats(text, jpype.java.util.ArrayList(references))
            all_lines.addStats(statistics)
            scores.append(float(statistics.score))
        self.meteor_scorer.computeMetrics(all_lines)
        return {"corpus": float(all_lines.score), "lines": scores}

    def spice(self, jars: Sequence[str], parses: str, lines: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """Compute SPICE of each (tokenized text, tokenized references).

        `jars` are those of CoreNLP, `parses` is the file in which parses are stored.
        """
        if self.spice_scorer is None:
            folder = self.package / "spice"
            paths = (folder / "spice-1.0.jar", *sorted((folder / "lib").glob("*.jar")), *map(Path, jars))
            self.spice_scorer = Spice(lambda name: self.java_class(name, *paths), Path(parses))
        return self.spice_scorer.score(lines)


class Spice:
    """SPICE with a persistent parser and with parses stored on disk."""

    def __init__(self, java_class: Callable[[str], Any], parses: Path) -> None:
        parser_class, true = java_class("edu.anu.spice.SpiceParser"), jpype.JClass("java.lang.Boolean").TRUE
        self.graph, self.statistics = java_class("edu.anu.spice.SceneGraph"), java_class("edu.anu.spice.SpiceStats")
        jpype.java.lang.Thread.currentThread().setContextClassLoader(parser_class.class_.getClassLoader())
        # None: without SPICE's own store, which fails on long texts
        self.parser = parser_class(None, cores(), true)
        self.parse = parser_class.class_.getDeclaredMethod("generateTuples", jpype.JClass("java.util.List").class_)
        self.parse.setAccessible(True)
        constants = java_class("edu.cmu.meteor.util.Constants")
        urls = [jpype.java.net.URL(f"{constants.DEFAULT_SYN_DIR_URL}/english.{name}") for name in SYNONYM_FILES]
        self.synonyms = java_class("edu.cmu.meteor.aligner.SynonymDictionary")(*urls)
        self.nodes = _field(self.graph, "graph")
        self.attributes = _field(java_class("edu.anu.spice.SceneGraphNode"), "attributes")
        self.node_map = java_class("edu.stanford.nlp.graph.DirectedMultiGraph")
        self.in_order = java_class("edu.stanford.nlp.util.MapFactory").linkedHashMapFactory()
        # text -> its parse: a list of lists of one, two or three words
        self.kept = jpype.java.util.HashMap()
        self.shelf = ParseStore(parses)

    def score(self, lines: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """Compute the F-score of each line."""
        self.read({text for line in lines for text in (line[0], *line[1])})
        statistics = self.statistics(jpype.java.util.HashMap(), False)
        for number, (text, references) in enumerate(lines):
            statistics.score(number, self.graph_of([text]), self.graph_of(references), True)
        return [float(line["scores"]["All"]["f"]) for line in json.loads(str(statistics.toJSONString()))]

    def graph_of(self, texts: Sequence[str]) -> Any:
        """Return the joint scene graph of some texts.

        A word is merged with its most similar node or attribute. SPICE resolves ties by the order
        of a hash map, and so by chance. Here its maps and sets keep insertion order.
        """
        graph = self.graph(self.synonyms, True)
        self.nodes.set(graph, self.node_map(self.in_order, self.in_order))
        known = 0
        for text in texts:
            for words in self.kept.get(text):
                # an attribute: before a node gets its second one, its set becomes an ordered one
                if words.size() == 2:
                    nodes = jpype.java.util.ArrayList(graph.nodeList())
                    for node in nodes.subList(known, nodes.size()):
                        self.attributes.set(node, jpype.java.util.LinkedHashSet(self.attributes.get(node)))
                    known = nodes.size()
                graph.addTuple(words)
        return graph

    def read(self, texts: set[str]) -> None:
        """Load the parses of these texts into memory, from disk or newly parsed."""
        if self.kept.size() + len(texts) > KEPT_PARSES:
            self.kept.clear()
        missing = sorted(text for text in texts if not self.kept.containsKey(text))
        array = jpype.java.util.ArrayList
        for text, parse in self.shelf.read(missing):
            self.kept.put(text, array([array(words) for words in parse]))
        missing = [text for text in missing if not self.kept.containsKey(text)]
        for start in range(0, len(missing), PARSE_BATCH):
            part = missing[start : start + PARSE_BATCH]
            parsed = self.parse.invoke(self.parser, array(part))
            self.shelf.write([(text, [[str(word) for word in words] for words in parsed.get(text)]) for text in part])
            self.kept.putAll(parsed)


def _field(java_class: Any, name: str) -> Any:
    """Return an accessible field of a class, even a private one."""
    field = java_class.class_.getDeclaredField(name)
    field.setAccessible(True)
    return field


class ParseStore:
    """The store of parses: an SQLite file that several processes may use at once."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # seconds to wait for another process that is writing
            self.database = sqlite3.connect(path, timeout=60)
            with self.database:
                self.database.execute(
                    "CREATE TABLE IF NOT EXISTS parses (text TEXT PRIMARY KEY, parse TEXT NOT NULL) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as error:
            raise UnusableFileError(
                f"{path}, where SPICE keeps its parses, cannot be used ({error}): remove it, or set XDG_CACHE_HOME to a folder "
                "that can be written."
            ) from None

    def read(self, texts: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
        """Return the stored parses of these texts, as (text, parse)."""
        found: list[tuple[str, list[list[str]]]] = []
        for start in range(0, len(texts), REQUEST_BATCH):
            part = texts[start : start + REQUEST_BATCH]
            marks = ",".join("?" * len(part))
            rows = self.database.execute(f"SELECT text, parse FROM parses WHERE text IN ({marks})", part)
            known = [(text, _load_parse(text, parse)) for text, parse in rows]
            found += [(text, parse) for text, parse in known if parse is not None]
        return found

    def write(self, parses: Sequence[tuple[str, list[list[str]]]]) -> None:
        """Store parses; those that another process stored meanwhile are the same."""
        with self.database:
            self.database.executemany(
                "INSERT OR REPLACE INTO parses VALUES (?, ?)",
                [(text, f"{json.dumps(parse)} {_checksum(text, json.dumps(parse))}") for text, parse in parses],
            )


def _checksum(text: str, parse: str) -> str:
    return f"{zlib.crc32(f'{text} {parse}'.encode('utf-8', 'backslashreplace')):08x}"


def _load_parse(text: str, stored: object) -> list[list[str]] | None:
    """Return a stored parse, or None if it is damaged or of an earlier version."""
    parse, _, checksum = stored.rpartition(" ") if isinstance(stored, str) else ("", "", "")
    return json.loads(parse) if parse and checksum == _checksum(text, parse) else None


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
