"""Draw the pictures of README.md and docs/algorithms.md: who generates a token, and who learns from it.

The marks under the tokens are the masks of the library (`Rollout.trained_tokens`, `Rollout.after_switch`), so the pictures
are true as long as they are current; `tests/test_docs.py` draws them again and compares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from rlgf.rl.tensors import Rollout
from rlgf.types import GUIDE, POLICY, Origin, Prompt

IMAGES = Path(__file__).resolve().parent / "images"
LETTER = {"x": Origin.PROMPT, "P": Origin.POLICY, "G": Origin.GUIDE}
CELL, GAP, HEIGHT, LEFT, WIDTH = 74, 4, 34, 16, 800
# fills under white text, and colors of text on a page: all readable on white and on black
FILL = {Origin.PROMPT: "#6e7781", Origin.POLICY: "#1f6feb", Origin.GUIDE: "#bc4c00"}
POLICY_MARK, CRITIC_MARK = "#1f6feb", "#8957e5"
STYLE = """
  text { font: 16px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #57606a }
  .title { font-weight: 600; font-size: 18px }
  .token { fill: #fff; text-anchor: middle }
  .small { font-size: 14px }
  @media (prefers-color-scheme: dark) { text { fill: #9ea7b3 } .token { fill: #fff } }
"""


@dataclass(frozen=True)
class Line:
    """A completion to draw: its words, the letter of each one's origin, and who is to finish it."""

    says: str
    words: str
    origins: str  # x: prompt, P: policy, G: guide
    rollout_by: Origin
    switch: int | None  # completion tokens before the switch; None: not drawn, as there is no rollin
    reward: str = "R"
    has_critic: bool = True


WORDS = "The film| was| a| quiet| joy| to| watch|."
PPO = Line("every completion", WORDS, "xPPPPPPP", POLICY, None)
PPO_PP = Line("with probability β the guide begins", WORDS, "xGGGPPPP", POLICY, 3)
AGGREVATED = Line("with probability β the policy begins", WORDS, "xPPPGGGG", GUIDE, 3)
GUIDE_ALONE = Line("otherwise the guide generates all of it", WORDS, "xGGGGGGG", GUIDE, None)
POLICY_ALONE = Line("otherwise the policy generates all of it", WORDS, "xPPPPPPP", POLICY, None)

MASKS: dict[str, Sequence[Line]] = {
    "mask-ppo": [PPO],
    "mask-ppo_pp": [PPO_PP, POLICY_ALONE],
    "mask-aggrevated": [AGGREVATED, GUIDE_ALONE],
    "mask-guided_grpo": [
        Line("with probability β the guide begins, once for the group", WORDS, "xGGGPPPP", POLICY, 3, "R₁", False),
        Line("another completion of the group", "The film| was| a| quiet| bore|.", "xGGGPP", POLICY, 3, "R₂", False),
    ],
    "mask-lols": [
        replace(PPO_PP, says="first half of the rows, with probability β of guide rollins"),
        replace(POLICY_ALONE, says="otherwise"),
        replace(AGGREVATED, says="second half of the rows, with probability β of policy rollins"),
        replace(GUIDE_ALONE, says="otherwise"),
    ],
    "mask-d2lols": [
        replace(AGGREVATED, says="before iteration α, with probability β of policy rollins"),
        replace(GUIDE_ALONE, says="otherwise"),
        replace(PPO_PP, says="from iteration α on, with probability β of guide rollins"),
        replace(POLICY_ALONE, says="otherwise"),
    ],
}
FIRST_PICTURE = {"PPO++": PPO_PP, "AggreVaTeD": AGGREVATED}


def rollout(line: Line) -> Rollout:
    """Return a line as a rollout of one row."""
    origin = torch.tensor([[int(LETTER[letter]) for letter in line.origins]], dtype=torch.uint8)
    zeros = torch.zeros(origin.shape)
    return Rollout(
        prompts=[Prompt("")], completions=[""], ids=origin.long(), origin=origin,
        switch_position=torch.tensor([line.switch or 0]), rollout_by=torch.tensor([int(line.rollout_by)], dtype=torch.uint8),
        phase=torch.tensor([0]), ended_with_eos=torch.tensor([True]), index=torch.tensor([0]), group=torch.tensor([0]),
        log_probs=zeros, full_log_probs=zeros, support=None, min_new_tokens=0,
    )  # fmt: skip


def text(x: float, y: float, words: str, kind: str = "", more: str = "") -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}{more}>{escape(words)}</text>'.replace("'", '"')


def tokens(line: Line, y: float) -> list[str]:
    """Return the boxes of a completion's tokens, colored by origin, and its reward."""
    drawn: list[str] = []
    for place, (letter, word) in enumerate(zip(line.origins, line.words.split("|"))):
        x = LEFT + place * (CELL + GAP)
        drawn.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{HEIGHT}" rx="5" fill="{FILL[LETTER[letter]]}"/>')
        drawn.append(text(x + CELL / 2, y + 22, word.strip(), "token"))
    end = LEFT + len(line.origins) * (CELL + GAP)
    drawn.append(text(end + 8, y + 22, f"→ {line.reward}"))
    if line.switch is not None:
        x = LEFT + (1 + line.switch) * (CELL + GAP) - GAP / 2
        drawn.append(f'<path d="M{x} {y - 7}v{HEIGHT + 14}" stroke="#8c959f" stroke-width="2" stroke-dasharray="4 3"/>')
    return drawn


def marks(mask: torch.Tensor, y: float, color: str) -> list[str]:
    """Return a bar under each selected token."""
    places = mask[0].nonzero().flatten().tolist()
    return [
        f'<rect x="{LEFT + place * (CELL + GAP)}" y="{y}" width="{CELL}" height="5" rx="2.5" fill="{color}"/>'
        for place in places
    ]


def svg(height: float, label: str, body: Sequence[str]) -> str:
    """Return a whole picture; `label` describes it for those who cannot see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</svg>"]) + "\n"


def legend(y: float) -> list[str]:
    """Return the meaning of the colors."""
    drawn, x = [], LEFT
    for origin, words in ((Origin.PROMPT, "prompt"), (GUIDE, "guide"), (POLICY, "policy")):
        drawn += [
            f'<rect x="{x}" y="{y - 11}" width="14" height="14" rx="3" fill="{FILL[origin]}"/>',
            text(x + 20, y + 1, words),
        ]
        x += 100
    return drawn


def first_picture() -> str:
    """Return the picture of README.md."""
    body, y = legend(18), 52.0
    says = {
        "PPO++": "the guide begins, the policy continues and learns from its own tokens",
        "AggreVaTeD": "the policy begins and learns how good that was, the guide continues",
    }
    for title, line in FIRST_PICTURE.items():
        body.append(f'<text x="{LEFT}" y="{y}"><tspan class="title">{title}</tspan>  {says[title]}</text>')
        body += tokens(line, y + 16)
        body += marks(rollout(line).trained_tokens("gae"), y + 55, POLICY_MARK)
        y += 94
    body.append(f'<rect x="{LEFT + 310}" y="12" width="30" height="5" rx="2.5" fill="{POLICY_MARK}"/>')
    body.append(text(LEFT + 348, 19, "tokens the policy learns from"))
    body.append(f'<path d="M{LEFT + 630} 5v20" stroke="#8c959f" stroke-width="2" stroke-dasharray="4 3"/>')
    body.append(text(LEFT + 640, 19, "switch position"))
    label = (
        "Two completions of the prompt 'The film'. PPO++: the guide generates the first three tokens, the policy the other "
        "four and learns from those. AggreVaTeD: the policy generates the first three and learns from those, the guide the "
        "other four. Each completion has one reward."
    )
    return svg(y - 22, label, body)


def mask_picture(name: str, lines: Sequence[Line]) -> str:
    """Return the masks of an algorithm: tokens by origin, and what policy and critic are fitted on."""
    body, y = legend(18), 46.0
    for line in lines:
        critic = "V^π" if line.rollout_by == POLICY else "V^g"
        body.append(text(LEFT, y, line.says))
        body += tokens(line, y + 14)
        drawn = rollout(line)
        trained = drawn.trained_tokens("gae")
        body += marks(trained, y + 56, POLICY_MARK)
        body += marks(drawn.after_switch, y + 74, CRITIC_MARK) if line.has_critic else []
        end = LEFT + len(line.origins) * (CELL + GAP) + 8
        body.append(text(end, y + 63, "policy loss" if bool(trained.any()) else "no policy loss", "small"))
        if line.has_critic:
            body.append(text(end, y + 81, f"critic {critic}", "small"))
        y += 112 if line.has_critic else 94
    label = " ".join(
        f"{line.says}: the origins of the tokens are {' '.join(line.origins)} (x prompt, P policy, G guide); the policy's loss "
        f"is on {_places(rollout(line).trained_tokens('gae'))}, "
        + (f"the critic on {_places(rollout(line).after_switch)}." if line.has_critic else "and there is no critic.")
        for line in lines
    )
    return svg(y - 18, f"{name.removeprefix('mask-')}. {label}", body)


BOX = {"input": "#6e7781", "call": "#1f6feb"}


def box(x: float, y: float, width: float, title: str, words: str, kind: str = "input") -> list[str]:
    """Return a box with a title and a second line."""
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="46" rx="6" fill="{BOX[kind]}"/>',
        text(x + width / 2, y + 20, title, "token"),
        text(x + width / 2, y + 37, words, "token note"),
    ]


def arrow(*points: tuple[float, float]) -> str:
    """Return an arrow along points."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="{path}" fill="none" stroke="#8c959f" stroke-width="2" marker-end="url(#head)"/>'


def iteration_picture() -> str:
    """Return the picture of one iteration in docs/architecture.md."""
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    body = [
        "<style>.note { font-size: 12.5px }</style>",
        f'<defs>{head}<path d="M0 0L8 4L0 8z" fill="#8c959f"/></marker></defs>',
    ]
    inputs = [
        ("Prompts", "tasks/"),
        ("Algorithm", "algorithms/guided.py"),
        ("Guide", "guides/"),
        ("Sampler", "generation/decoder.py"),
    ]
    for place, (title, words) in enumerate(inputs):
        y = 10 + 58 * place
        body += box(16, y, 150, title, words)
        body.append(arrow((166, y + 23), (196, y + 23), (196, 97 if place < 2 else 103), (222, 97 if place < 2 else 103)))
    calls = [
        (224, "collect_rollout", "rl/rollout.py"),
        (424, "make_experience", "rl/experience.py"),
        (634, "update", "rl/update.py"),
    ]
    for x, title, words in calls:
        body += box(x, 77, 150, title, words, "call")
    body += [arrow((374, 100), (422, 100)), arrow((574, 100), (632, 100)), *box(424, 10, 150, "Reward", "rewards/")]
    body += [arrow((499, 56), (499, 75)), arrow((709, 123), (709, 207), (168, 207))]
    body += [
        text(340, 146, "Rollout: ids, origin, switch_position", "small"),
        text(556, 68, "Experience: advantages, returns", "small"),
    ]
    body.append(text(420, 200, "policy, critics", "small"))
    label = (
        "One iteration: prompts, the algorithm, the guide and the sampler go into collect_rollout, whose rollout and the "
        "reward go into make_experience, whose experience goes into update; the updated policy goes back to the sampler."
    )
    return svg(250, label, body)


def _places(mask: torch.Tensor) -> str:
    found = [str(place) for place in mask[0].nonzero().flatten().tolist()]
    return f"tokens {', '.join(found)}" if found else "no token"


def pictures() -> dict[str, str]:
    """Return all pictures by file name."""
    first = {"guided.svg": first_picture(), "iteration.svg": iteration_picture()}
    return {**first, **{f"{name}.svg": mask_picture(name, lines) for name, lines in MASKS.items()}}


if __name__ == "__main__":
    for name, drawn in pictures().items():
        (IMAGES / name).write_text(drawn, encoding="utf-8")
