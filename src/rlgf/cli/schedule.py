"""The phases of an algorithm over training, in words and as a chart."""

from collections.abc import Sequence

from rlgf.algorithms.guided import Algorithm
from rlgf.cli.terminal import write
from rlgf.types import GUIDE, POLICY


def describe_phases(algorithm: Algorithm) -> list[str]:
    """Return a readable description of each phase."""
    names = {POLICY: "policy", GUIDE: "guide"}
    lines: list[str] = []
    for phase in algorithm.phases:
        end = f"the {names[phase.rollout]} generates all of it"
        if phase.rollin is not None:
            end = f"with probability {phase.beta:g} the {names[phase.rollin]} starts; the {names[phase.rollout]} finishes"
        lines.append(end)
    return lines


def print_algorithm(algorithm: Algorithm, iterations: int, uniforms: Sequence[float]) -> None:
    """Print the phases of an algorithm and the iterations that use each."""
    write((f"{algorithm.title}: {algorithm.summary}", "bold"))
    for number, line in enumerate(describe_phases(algorithm)):
        phase = algorithm.phases[number]
        critic = "V^π" if phase.rollout == POLICY else "V^g"
        write(f"  phase {number}: {line}; critic {critic}")
    names = {POLICY: "policy"}
    width = 60
    write()
    for number, phase in enumerate(algorithm.phases):
        cells = ""
        for place in range(min(width, iterations)):
            iteration = place * iterations // min(width, iterations)
            share = sum(s.fraction for s in algorithm.schedule(iteration, uniforms[iteration]) if s.phase == number)
            cells += "·" if share == 0 else "█" if share > 0.99 else "▄"
        rollin = "–" if phase.rollin is None else names.get(phase.rollin, "guide")
        label = f"{rollin} → {names.get(phase.rollout, 'guide')}"
        write(f"  {label:18}{cells}  iterations 0–{iterations - 1}")
    write(("  █ all completions of the iteration   ▄ a part   · none", "dim"))
