"""Text metrics without Java: hand-checked numbers, files that are scored, functions for rewards, errors."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlgf.cli.app import app
from rlgf.errors import INPUT_ERRORS
from rlgf.rewards.build import scorers_in
from rlgf.text_metrics import captions, score
from rlgf.text_metrics.as_rewards import TEXT_FUNCTIONS, build_text_function, on_text
from rlgf.text_metrics.diversity import distinct, repetition, self_bleu
from rlgf.text_metrics.rouge import Rouge
from rlgf.text_metrics.score import Line, Options
from rlgf.types import Prompt


def close(*values: float) -> Any:
    return pytest.approx(list(values), abs=1e-6)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_distinct_counts_pairs_of_words_over_all_texts() -> None:
    assert distinct(["a b a b", "a b"]) == pytest.approx(2 / 4)  # ab ba ab | ab: two different of four
    assert distinct(["a", ""]) == 0.0
    assert distinct(["a b c"], order=1) == 1.0


def test_repetition_is_the_share_of_grams_said_before() -> None:
    assert repetition("a b a b a b", order=2) == pytest.approx(3 / 5)  # ab ba ab ba ab: two of five are new
    assert repetition("a b c d") == 0.0
    assert repetition("a b") == repetition("") == 0.0  # no three words


def test_bleu_is_the_packages_with_the_closest_references_length() -> None:
    corpus, lines = captions.bleu(["a b c d e", "a b"], [["a b c d e"], ["a b c d", "x"]])
    assert [lines[order][0] for order in range(4)] == close(1, 1, 1, 1)
    # `x` is closer to two words than `a b c d`: no penalty. There are no three words, for which the package has 1e-15 / 1e-9
    assert [lines[order][1] for order in range(4)] == close(1, 1, 1e-6 ** (1 / 3), 1e-12 ** (1 / 4))
    assert corpus == close(1, 1, 1, 1)  # seven of seven words, five of five pairs, …


def test_an_empty_text_scores_nothing_and_stays_finite() -> None:
    references = [["a dog runs", "a cat"]]
    assert captions.rouge_l([""], references) == [0.0]
    assert captions.rouge_l([""], [[""]]) == [0.0]  # the package takes both for one equal word
    assert captions.bleu([""], references)[1] == [[0.0]] * 4
    assert captions.CiderD([["a dog"], ["a cat"]])([""], references) == [0.0]
    assert Rouge()([""], references) == {key: [0.0] for key in ("rouge1", "rouge2", "rougeL", "rougeLsum")}


def test_rouge_l_of_the_caption_tools_weighs_recall() -> None:
    # two of three words in order: precision 2/3; of two: recall 1; F = 2.44 · 2/3 · 1 / (1 + 1.44 · 2/3)
    assert captions.rouge_l(["a b c"], [["a c"]]) == close(2.44 * (2 / 3) / (1 + 1.44 * 2 / 3))


def test_rouge_takes_the_best_reference_and_stems_if_asked() -> None:
    found = Rouge()(["the dogs ran"], [["the cat sat down", "the dogs ran home"]])
    assert found["rouge1"] == close(2 * 1 * 0.75 / 1.75)  # three of three words, three of four
    assert found["rouge2"] == close(2 * 1 * (2 / 3) / (5 / 3))
    assert Rouge()(["dogs"], [["dog"]])["rouge1"] == [0.0]
    assert Rouge(stemming=True)(["dogs"], [["dog"]])["rouge1"] == [1.0]


def test_rouge_lsum_takes_lines_for_sentences() -> None:
    found = Rouge()(["a b\nc d"], [["c d\na b"]])
    assert found["rougeLsum"] == [1.0]
    assert found["rougeL"] == close(0.5)  # as one sentence only `a b` or `c d` keeps its order


def test_cider_d_by_hand() -> None:
    cider = captions.CiderD([["a b"], ["a c"]])
    # `a` is in both documents and weighs ln 2 − ln 2 = 0; `b` and `a b` weigh ln 2. Orders 1 and 2 agree, 3 and 4 do not exist
    assert cider(["a b"], [["a b"]]) == close(10 * (1 + 1 + 0 + 0) / 4)
    # `a b b`: counts b 2, ab 1, bb 1; against `a b`: b clipped at 1, so min(2, 1) · 1 / (2 · 1); ab 1 · 1 / √2; a word longer
    assert cider(["a b b"], [["a b"]]) == close(10 * (1 / 2 + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72))
    assert cider(["z"], [["a b"]]) == [0.0]


def test_cider_d_with_given_frequencies_is_the_packages_where_they_are_its_own() -> None:
    texts = ["a man rides a horse", "a dog runs", "the the the", "a dog runs in the park with a dog"]
    references = [["a man on a horse", "a person rides"], ["a dog is running"], ["the cat"], ["a dog runs", "dogs in the park"]]
    assert captions.CiderD(references)(texts, references) == pytest.approx(captions.cider_d(texts, references)[1], abs=1e-12)


def test_self_bleu_is_bleu_against_all_others() -> None:
    texts = ["a b c d", "a b c d", "x y z w", "a b c e e", ""]
    by_hand = [
        captions.bleu([text], [[other for place, other in enumerate(texts) if place != number]])[1][3][0]
        for number, text in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(by_hand, abs=1e-12)
    assert by_hand[0] == pytest.approx(1.0, abs=1e-6)  # it has a twin
    assert self_bleu(["alone"]) is None


def test_halves_of_surrogate_pairs_become_the_replacement_character() -> None:
    assert [captions.plain(text) for text in ("a\ud800b", "😀", "\udc00", "é")] == ["a\ufffdb", "😀", "\ufffd", "é"]


# --- which metrics, and what they read --------------------------------------------------------------------------------


def test_groups_and_keys_in_the_order_of_the_table() -> None:
    assert score.resolve_metric_names("distinct, bleu_4,rouge") == [
        "bleu_4", "rouge_l", "rouge1", "rouge2", "rougeL", "rougeLsum", "distinct_1", "distinct_2", "distinct_3",
    ]  # fmt: skip
    assert score.resolve_metric_names(score.DEFAULT)[:4] == ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]
    with pytest.raises(INPUT_ERRORS, match=r"unknown metric 'spiec': did you mean 'spice'\?"):
        score.resolve_metric_names("bleu,spiec")
    with pytest.raises(INPUT_ERRORS, match="--metrics is empty"):
        score.resolve_metric_names(" , ")


def written(path: Path, *rows: Any, compress: bool = False) -> str:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if compress else content)
    return str(path)


@pytest.mark.parametrize("compress", [False, True])
def test_a_file_plain_or_gzip_whatever_its_name(tmp_path: Path, compress: bool) -> None:
    file = written(
        tmp_path / "texts", {"prediction": "a", "references": "one text"}, "", {"prediction": "", "references": ["b", "c"]},
        compress=compress,
    )  # fmt: skip
    assert score.read_lines(file, ["rouge1"]) == [Line("a", ("one text",)), Line("", ("b", "c"))]
    assert score.read_lines(file, ["distinct_1"]) == [Line("a"), Line("")]


GOOD = {"prediction": "a", "references": ["b"], "concepts": ["c"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"references": ["b"]}, "line 2: there is no 'prediction'; it has 'references'."),
        ({"prediction": None, "references": ["b"]}, "line 2: 'prediction' is null, but must be a string."),
        ({"prediction": ["a"], "references": ["b"]}, "line 2: 'prediction' is a list with other values, but must be"),
        ({"prediction": "a"}, "line 2: there is no 'references'"),
        ({"prediction": "a", "references": []}, "line 2: 'references' is empty"),
        ({"prediction": "a", "references": ["b", " "]}, "line 2: 'references' has an empty string"),
        (
            {"prediction": "a", "references": ["b", 3]},
            "line 2: 'references' is a list with other values, but must be a list",
        ),
        ({"prediction": "a", "references": {"b": 1}}, "line 2: 'references' is an object"),
        ({"prediction": "a", "references": ["b"], "concepts": []}, "line 2: 'concepts' is empty"),
        ("[1]", "line 2: expected an object, found list"),
        ('{"prediction": "a', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: n"),
    ],
)
def test_a_bad_line_is_one_sentence_that_names_it(tmp_path: Path, row: Any, message: str) -> None:
    file = written(tmp_path / "texts.jsonl", GOOD, row)
    with pytest.raises(INPUT_ERRORS) as caught:
        score.read_lines(file, ["bleu_1", "concept_coverage"])
    assert str(caught.value).startswith(f"{file}, {message}")


def test_files_that_are_empty_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(INPUT_ERRORS, match="has no lines: give a file with a JSON object per line"):
        score.read_lines(written(tmp_path / "empty.jsonl", ""), ["bleu_1"])
    with pytest.raises(INPUT_ERRORS, match="cannot be read: No such file or directory"):
        score.read_lines(str(tmp_path / "none.jsonl"), ["bleu_1"])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prediction": "a"}\n' * 1000)[:60])
    with pytest.raises(INPUT_ERRORS, match="cannot be decoded"):
        score.read_lines(str(tmp_path / "cut.jsonl.gz"), ["distinct_1"])


def test_scores_of_the_file_and_of_each_line() -> None:
    lines = [Line("a b", ("a b",)), Line("c", ("d", "c d e")), Line("a b", ("x",))]
    found = score.score(lines, ["rouge1", "distinct_1", "distinct_3", "self_bleu"], Options())
    assert found.per_line["rouge1"] == close(1, 0.5, 0)
    assert found.corpus["rouge1"] == pytest.approx(0.5)
    assert found.corpus["distinct_1"] == pytest.approx(3 / 5)
    assert found.corpus["distinct_3"] == 0.0
    assert list(found.corpus) == ["rouge1", "distinct_1", "distinct_3", "self_bleu"]
    assert set(found.per_line) == {"rouge1", "self_bleu"}
    assert score.score(lines[:1], ["self_bleu"], Options()).corpus == {"self_bleu": None}


def test_the_table_multiplies_as_the_field_does_and_says_so() -> None:
    scores = score.Scores(
        {"bleu_4": 0.2916, "cider_d": 1.5690049, "spice": 0.32, "meteor": 0.3, "rougeL": 0.5, "self_bleu": None}
    )
    assert score.table(scores) == [
        ["bleu_4", "29.16", "× 100"],
        ["cider_d", "15.69", "× 10"],
        ["spice", "32.00", "× 100"],
        ["meteor", "0.3000", ""],
        ["rougeL", "0.5000", "summarization tools"],
        ["self_bleu", "–", ""],
    ]


def test_the_command_writes_a_table_and_json(tmp_path: Path) -> None:
    file = written(tmp_path / "texts.jsonl", {"prediction": "the dogs", "references": ["the dog"]}, GOOD)
    out = tmp_path / "new" / "scores.json"
    ran = CliRunner().invoke(app, ["score", file, "--metrics", "rouge1,distinct_1", "--stem", "--json", str(out)])
    assert ran.exit_code == 0
    assert ran.stdout.split("\n")[0].split() == ["2", "lines", "score", "shown", "as"]
    assert "rouge1      0.5000  summarization tools" in ran.stdout
    found = json.loads(out.read_text())
    assert found["corpus"] == {"rouge1": 0.5, "distinct_1": 1.0}
    assert found["per_line"] == {"rouge1": [1.0, 0.0]}
    assert found["lines"] == 2
    assert found["options"]["stemming"] is True
    assert found["packages"]["rouge-score"]


def test_json_to_standard_output_comes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path / "texts.jsonl", GOOD)
    ran = CliRunner().invoke(app, ["score", file, "--metrics", "rouge1", "--json", "-"])
    assert json.loads(ran.stdout)["corpus"] == {"rouge1": 0.0}
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    file = written(tmp_path / "texts.jsonl", GOOD)
    for place in (tmp_path, Path(file) / "scores.json"):
        with pytest.raises(INPUT_ERRORS, match=r"cannot be written"):
            CliRunner().invoke(app, ["score", file, "--metrics", "rouge1", "--json", str(place)], catch_exceptions=False)


def test_standard_input_plain_and_gzip() -> None:
    row = json.dumps({"prediction": "a b", "references": ["a"]}).encode() + b"\n"
    for content in (row, gzip.compress(row)):
        ran = CliRunner().invoke(app, ["score", "-", "--metrics", "rouge1"], input=content)
        assert ran.exit_code == 0, ran.output
        assert "0.6667" in ran.stdout


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines = [Line("a", ("b",))]
    for key, extra in (("bleu_4", "captions"), ("rouge1", "rouge"), ("bertscore_f1", "bertscore"), ("self_bleu", "captions")):
        with pytest.raises(INPUT_ERRORS, match=rf"pip install 'rlgf\[{extra}\]'"):
            score.score(lines, [key], Options())


# --- functions for rewards --------------------------------------------------------------------------------------------


PROMPTS = [Prompt("one", ("a dog runs", "the dog ran")), Prompt("two", ("a cat",), columns={"concepts": ["cat"]})]


def test_a_function_reads_its_prompts_references() -> None:
    rouge1 = build_text_function("rouge1", options={"stemming": True})
    assert rouge1(PROMPTS, ["dogs run", ""]) == close(2 * 1 * (2 / 3) / (5 / 3), 0)
    assert rouge1([], []) == []


def test_penalties_are_zero_at_best_and_count_words() -> None:
    length = build_text_function("length_penalty", options={"maximum": 3, "minimum": 2})
    assert length([PROMPTS[0]] * 4, ["a b c d e", "a b", "a", ""]) == [-2.0, 0.0, -1.0, -2.0]
    again = build_text_function("repetition_penalty", options={"order": 1})
    assert again([PROMPTS[0]] * 3, ["a a a a", "a b", ""]) == [-0.75, 0.0, 0.0]


def test_a_prompt_without_what_a_function_reads_is_an_error() -> None:
    function = on_text(lambda texts, references: [0.0] * len(texts))
    assert function([Prompt("p", ("", "b"))], ["x"]) == [0.0]
    with pytest.raises(ValueError, match="the prompt 'p' has no references"):
        function([Prompt("p", (" ",))], ["x"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cidr", {}, "unknown text function 'cidr': did you mean 'cider_d'?"),
        (
            "rouge1",
            {"steming": True},
            "unknown option of 'rouge1' 'reward.options.rouge1.steming': did you mean 'reward.options.rouge1.stemming'?",
        ),
        ("rouge1", {"stemming": "yes"}, "metric 'rouge1': reward.options.rouge1.stemming is 'yes', but must be true or false."),
        ("meteor", {"a": 1}, "'meteor' takes no options, but was given 'a': remove it."),
        ("rouge1", {"train_prompts": []}, "unknown option of 'rouge1' 'reward.options.rouge1.train_prompts'"),
        ("length_penalty", {}, "'length_penalty' needs the option 'maximum': set reward.options.length_penalty.maximum."),
        ("length_penalty", {"maximum": 1, "minimum": 2}, "'length_penalty' has minimum 2 and maximum 1"),
        (
            "repetition_penalty",
            {"order": 0},
            "metric 'repetition_penalty': reward.options.repetition_penalty.order is 0, but must be at least 1.",
        ),
    ],
)
def test_wrong_names_and_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(INPUT_ERRORS) as caught:
        build_text_function(name, PROMPTS, options)
    assert str(caught.value).startswith(message)


def test_the_names_of_the_functions_are_the_keys_of_the_scores() -> None:
    both = set(TEXT_FUNCTIONS) & set(score.KEYS)
    assert set(score.KEYS) - both == {"distinct_1", "distinct_2", "distinct_3", "self_bleu"}  # of several texts together
    assert set(TEXT_FUNCTIONS) - both == {"spider", "length_penalty", "repetition_penalty"}


class SpiceOfOneJar(captions.Spice):
    """SPICE without Java."""

    def __init__(self) -> None:
        self.jars, self.parses = [], Path()


def test_spice_refuses_texts_that_its_parser_would_take_minutes_for() -> None:
    with pytest.raises(INPUT_ERRORS, match=r"at most 150 words .* text 2 or a reference of it has 151"):
        SpiceOfOneJar()(["a", "a"], [["b"], ["c", "d " * 151]])


def test_spice_is_asked_in_parts_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask(operation: str, jars: Any, parses: str, lines: Any) -> list[float]:
        asked.append(len(lines))
        return [0.5] * len(lines)

    monkeypatch.setattr(captions.JAVA, "request", ask)
    told: list[tuple[int, int]] = []
    assert SpiceOfOneJar()(["a"] * 600, [["b"]] * 600, lambda done, of: told.append((done, of))) == [0.5] * 600
    assert asked == [256, 256, 88]
    assert told == [(256, 600), (512, 600), (600, 600)]


# --- BERTScore --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BERT of two layers with a dozen words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "runs", "sleeps", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=24, **shape)).save_pretrained(folder)
    return str(folder)


@pytest.mark.integration
def test_bertscore_is_its_packages(encoder: str, quiet_loading: None) -> None:
    from bert_score import BERTScorer

    texts, references = (
        ["a dog runs", "a cat .", " ", "a"],
        [["a dog sleeps", "a cat runs ."], ["a cat ."], ["a"], ["\ud800 dog"]],
    )
    theirs = BERTScorer(encoder, num_layers=2)
    theirs._tokenizer.model_max_length = 24
    expected = theirs.score([texts[0], texts[1], texts[3]], [*references[:2], ["\ufffd dog"]])
    from rlgf.text_metrics.bertscore import BertScore

    found = BertScore(encoder, 2)(texts, references)
    for key, column in zip(("bertscore_precision", "bertscore_recall", "bertscore_f1"), expected):
        values = column.tolist()
        assert found[key] == pytest.approx([*values[:2], 0.0, values[2]], abs=1e-6)
    assert found["bertscore_f1"][1] == pytest.approx(1.0, abs=1e-5)
    assert found["bertscore_f1"][0] < 1
    assert BertScore(encoder, 2)([" "], [["a"]])["bertscore_f1"] == [0.0]


@pytest.mark.integration
def test_bertscore_counts_what_its_model_cannot_read_whole(encoder: str, quiet_loading: None) -> None:
    long = "a dog " * 20
    lines = [Line("a dog", ("a cat",)), Line(long, ("a cat",))]
    found = score.score(lines, ["bertscore_f1"], Options(bertscore_model=encoder, bertscore_layers=2))
    assert found.warnings == ["BERTScore truncated 1 texts to its model's context."]
    function = build_text_function("bertscore_f1", options={"model": encoder, "layers": 2})
    assert function([PROMPTS[1]], ["a cat"]) == close(found_alone(encoder))
    (value,) = function([PROMPTS[1]], [long])
    assert 0 < value < 1
    (model,) = scorers_in(function)
    assert model.num_truncated == 1


def found_alone(encoder: str) -> float:
    options = Options(bertscore_model=encoder, bertscore_layers=2)
    return score.score([Line("a cat", ("a cat",))], ["bertscore_f1"], options).per_line["bertscore_f1"][0]


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        ("my/model", None, "BERTScore has no default layer for 'my/model'"),
        ("ENCODER", 5, "BERTScore with 5 layers: num_layers should be between 0 and 2"),
        ("/nowhere", 1, "no encoder for BERTScore can be loaded from '/nowhere'"),
    ],
)
def test_bertscore_of_what_cannot_be_loaded(
    encoder: str, quiet_loading: None, model: str, layers: int | None, message: str
) -> None:
    with pytest.raises(INPUT_ERRORS) as caught:
        build_text_function("bertscore_f1", options={"model": encoder if model == "ENCODER" else model, "layers": layers})
    assert str(caught.value).startswith(message)


@pytest.fixture
def quiet_loading() -> Callable[[], None] | None:
    import transformers

    transformers.logging.disable_progress_bar()
    return None
