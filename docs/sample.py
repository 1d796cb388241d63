"""Make the sample in docs/guides.md: a run whose guide has another tokenizer than the policy, in the authors' colors.

    make sample        # minutes; needs a model of 260,032 parameters that writes little stories

The model writes stories, on which a policy with a byte-level tokenizer of its own is trained; then the same model guides that
policy through text (LOLS, so that both begin and both finish). Everything lies in build/sample.
"""

import argparse
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from rlgf.cli.console import print_rollout, quiet
from rlgf.data.files import read_complete_lines
from rlgf.guides.base import CompletionRequest
from rlgf.guides.local import TextModelGuide
from rlgf.models.loading import load_language_model
from rlgf.types import Prompt, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
WORK, PICTURE, TEXT = ROOT / "build" / "sample", ROOT / "docs" / "images" / "two-tokenizers.svg", "two-tokenizers.txt"
OPENINGS = (
    "Once upon a time there was", "One day a little girl", "The big dog saw", "Tom and his friend", "In the park there was",
    "Lily had a", "It was a sunny day and", "Mom said that",
)  # fmt: skip
SIZES = {"unsup": 1600, "train": 400, "test": 64}
TRAIN = (
    "imdb-small", "--algorithm", "lols", "--seed", "0", "--iterations", "6", "task.options.prompt_tokens=12",
    "task.max_new_tokens=32", "task.min_new_tokens=0", "model.vocabulary=800", "model.layers=2", "model.width=128",
    "model.heads=4", "model.max_length=64", "pretrain.steps=500", "pretrain.batch_size=16",
    "algorithm.options.lols.beta_guide=0.8",
    "ppo.completions_per_iteration=32", "ppo.minibatch_size=16", "evaluation.final_prompts=32", "evaluation.every=0",
    "runtime.trackers=[]", "runtime.threads=1",
)  # fmt: skip
BLUE, GREY = (30, 90, 200), (90, 90, 90)
WHITE = TerminalTheme((255, 255, 255), (40, 40, 40), [GREY] * 4 + [BLUE] + [GREY] * 3)


def write_stories(model: str) -> None:
    """Stories by the model, as the task's data: a label says whether somebody is happy or smiles in it."""
    guide = TextModelGuide(load_language_model(model).frozen_copy(), SamplingParams(temperature=0.9))
    start = 0
    for split, count in SIZES.items():
        asked = [
            CompletionRequest(Prompt(OPENINGS[index % len(OPENINGS)]), [1] * 8, "", [], 90, 0, start + index, 0)
            for index in range(count)
        ]
        texts = [
            request.prompt.text + answer.text
            for at in range(0, count, 64)
            for request, answer in zip(asked[at : at + 64], guide.complete(asked[at : at + 64]))
        ]
        rows = [{"text": text, "label": int(bool(re.search("happy|smil|love", text)))} for text in texts]
        (WORK / "data").mkdir(parents=True, exist_ok=True)
        (WORK / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        start += count


def draw(rows: list[dict[str, object]]) -> None:
    """The texts as a picture and as plain text."""
    picture, plain = Console(record=True, width=110, file=io.StringIO(), color_system="truecolor"), io.StringIO()
    for row in rows:
        print_rollout(row, picture, soft_wrap=False)
        print_rollout(row, Console(file=plain, width=110), soft_wrap=False)
    made = picture.export_svg(title="rlgf samples build/sample/run", theme=WHITE, unique_id="sample")
    made = re.sub(r"@font-face \{.*?\}\s*", "", made, flags=re.DOTALL)  # no fonts from elsewhere
    PICTURE.write_text(made.replace("Fira Code", "monospace"))
    PICTURE.with_name(TEXT).write_text(plain.getvalue())


def main() -> None:
    """Write the stories, train, draw."""
    parser = argparse.ArgumentParser(description="Make the sample in docs/guides.md.")
    parser.add_argument("--model", required=True, help="a folder with a model that writes little stories")
    model = parser.parse_args().model
    torch.manual_seed(0)
    quiet()
    if not (WORK / "data" / "test.jsonl").is_file():
        write_stories(model)
    run = WORK / "run"
    command = [sys.executable, "-m", "rlgf", "train", *TRAIN, "--data", str(WORK / "data"), "--guide", f"model:{model}"]
    subprocess.run([*command, "--out", str(run), "--stages", str(WORK / "stages")], check=True, cwd=ROOT)
    rows = read_complete_lines(run / "rollouts.jsonl")
    last = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
    both = [row for row in last if len(row["spans"]) == 2 and min(span["tokens"] for span in row["spans"]) >= 6]
    chosen = [[row for row in both if row["spans"][0]["origin"] == author][:2] for author in ("guide", "policy")]
    draw([row for pair in chosen for row in pair])
    print(PICTURE.with_name(TEXT).read_text())


if __name__ == "__main__":
    main()
