"""Valid results of a guide, and the refusal of all others."""

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hostile import HOSTILE, is_clean
from rlgf.config.specs import load_object
from rlgf.errors import GuideError
from rlgf.guides.base import Completion, CompletionRequest, query_guide
from rlgf.guides.local import FunctionGuide, as_guide
from rlgf.types import Prompt


def request(text: str = "a") -> CompletionRequest:
    return CompletionRequest(Prompt(text), [1], "", [], 3, 0, 0, 0)


def asked(returned: Any, text: str = "a") -> Completion:
    (completion,) = query_guide(FunctionGuide(lambda requests: returned), [request(text)])
    return completion


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2], (1, 2), range(1, 3), torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), np.array([1, 2]),
        np.array([1, 2], dtype=np.uint8), [np.int64(1), np.int32(2)], [torch.tensor(1), torch.tensor(2)],
    ],
)  # fmt: skip
def test_ids_are_taken_whatever_holds_them(ids: Any) -> None:
    found = asked([Completion("", True, ids)])
    assert found.ids == (1, 2)
    assert found.ids is not None
    assert all(type(token) is int for token in found.ids)
    assert asked([Completion("", True, ids[:0])]).ids == ()


@pytest.mark.parametrize(
    "ids",
    [
        [1, -2], [1.0, 2.0], [[1, 2]], torch.tensor([[1, 2]]), torch.tensor([1.5]), torch.tensor(3), np.array([[1]]),
        np.array(1),
        [True], torch.tensor([True]), "12", b"12", {1: 2}, {1, 2}, 3, [None], ["1"], [torch.tensor([1])], object(),
        np.array([-1]),
    ],
)  # fmt: skip
def test_other_ids_are_refused_in_one_sentence(ids: Any) -> None:
    with pytest.raises(
        GuideError, match=r"the guide returned the ids .* for the prompt 'a': they must be a flat list"
    ) as caught:
        asked([Completion("", True, ids)])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("returned", [{"a text": 1}, {"a text"}, b"a", "a text", None, 3, Completion("a", True)])
def test_what_is_no_list_of_completions_is_refused(returned: Any) -> None:
    with pytest.raises(GuideError, match=r"the guide failed on 1 requests \(TypeError: it returned .* instead of a list"):
        asked(returned)


@pytest.mark.parametrize(
    "completion",
    [Completion("a", "no"), Completion("a", 1), Completion("a", True, None, "x"), Completion(3, True), 3, None, ["a"]],  # type: ignore[arg-type]
)  # fmt: skip
def test_what_is_no_completion_is_refused(completion: Any) -> None:
    with pytest.raises(GuideError, match="it must return a string or a `Completion`"):
        asked([completion])


def test_flags_of_numpy_are_flags() -> None:
    found = asked([Completion("a", np.True_)])  # type: ignore[arg-type]
    assert found.finished is True


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit(), ValueError("no"), MemoryError()], ids=repr)
def test_a_guide_that_ends_the_program_or_fails_is_an_error(error: BaseException) -> None:
    def guide(requests: Sequence[CompletionRequest]) -> list[str]:
        raise error

    with pytest.raises(GuideError, match=rf"the guide failed on 1 requests \({type(error).__name__}") as caught:
        query_guide(FunctionGuide(guide), [request()])
    assert caught.value.exit_code == 3


def test_ctrl_c_passes() -> None:
    def guide(requests: Sequence[CompletionRequest]) -> list[str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        query_guide(FunctionGuide(guide), [request()])


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_prompts_and_completions_are_shown_clean(text: str) -> None:
    for returned in ([Completion(text, True, [-1])], [[text]], [Completion("", False)]):
        with pytest.raises(GuideError) as caught:
            asked(returned, text)
        assert is_clean(str(caught.value))
        assert len(str(caught.value)) < 500


def test_the_guides_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "guides.md").read_text(encoding="utf-8")
    section = page.partition("## Your own guide")[2].partition("\n## ")[0]
    (tmp_path / "my_guides_of_the_page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)))
    file = str(tmp_path / "my_guides_of_the_page.py")
    prompt = Prompt("2 + 2 =", (" four.",), columns={"answer": 4})
    begun = CompletionRequest(prompt, [], " fo", [], 8, 0, 0, 0)
    answers = FunctionGuide(load_object(f"python:{file}:answers", "guide"))
    assert query_guide(answers, [begun])[0].text == " 4."
    assert not answers.capabilities.can_continue
    lookup = as_guide(load_object(f"python:{file}:lookup", "guide"))
    assert query_guide(lookup, [begun]) == [Completion("ur.", finished=True)]
    body = json.dumps({"outputs": [{"text": " it", "finish_reason": "length"}]}).encode()
    monkeypatch.setattr("urllib.request.urlopen", lambda call, timeout: io.BytesIO(body))
    monkeypatch.setenv("GUIDE_URL", "http://127.0.0.1/x")
    api = FunctionGuide(load_object(f"python:{file}:api", "guide"))
    assert query_guide(api, [begun]) == [Completion(" it", finished=False)]


def test_a_guide_that_changes_its_requests_changes_nothing_else() -> None:
    requests = [CompletionRequest(Prompt("a"), [1, 2], "", [3], 3, 0, 0, 0)]

    def clear(given: list[CompletionRequest]) -> list[str]:
        assert isinstance(given[0].prompt_ids, tuple)
        assert isinstance(given[0].prefix_ids, tuple)
        given.clear()
        return [" superb"]

    assert query_guide(FunctionGuide(clear), requests)[0].text == " superb"  # pyright: ignore[reportArgumentType]
    assert requests == [CompletionRequest(Prompt("a"), [1, 2], "", [3], 3, 0, 0, 0)]


def test_the_grad_mode_and_the_working_directory_are_restored(tmp_path: Path) -> None:
    before = Path.cwd()

    def change(given: Sequence[CompletionRequest]) -> list[str]:
        torch.set_grad_enabled(False)
        os.chdir(tmp_path)
        return [" superb"]

    try:
        query_guide(FunctionGuide(change), [request()])
        assert torch.is_grad_enabled()
        assert Path.cwd() == before
    finally:
        torch.set_grad_enabled(True)
        os.chdir(before)
