"""Try every architecture of the installed transformers: `python tools/sweep.py [TYPE …]`.

Each is a tiny model with random weights, in a process of its own. It is loaded as any model,
sampled from (prompts of different lengths, restarts), and the log-probabilities are compared with
those of training; then gradients, a value head and LoRA adapters are tried. Verdicts: right;
refused (one sentence); WRONG (accepted, but the numbers differ); TRACEBACK; not built (this script
made no tiny one). Results are kept in build/sweep.json, and a second call tries what is missing;
`--table` writes the table of docs/models.md from them.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny_models

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "sweep.json"
DOCS = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"
TIMEOUT = 300  # seconds
TOLERANCE = 1e-3  # nats
VERDICTS = ("right", "refused", "WRONG", "TRACEBACK", "not built")


def import_slow_modules() -> None:
    """Import what every architecture needs, once."""
    import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
    import torch

    import rlgf.rl.model_check  # noqa: F401  # pyright: ignore[reportUnusedImport]

    torch.set_num_threads(1)


def try_architecture(name: str, seq2seq: bool) -> dict[str, Any]:
    """Return the verdict on an architecture, in this process."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        model = tiny_models.tiny_model(name, seq2seq)
    except Exception as error:
        return {"verdict": "not built", "reason": _line(error)}
    from rlgf.errors import RlgfError
    from rlgf.models.loading import load_language_model
    from rlgf.rl.model_check import check_model

    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            tiny_models.tiny_tokenizer().save_pretrained(folder)
        except Exception as error:
            return {"verdict": "not built", "reason": f"it cannot be saved: {_line(error)}"}
        try:
            report = check_model(load_language_model(folder))
        except RlgfError as error:
            return {"verdict": "refused", "reason": str(error).replace(folder, "MODEL")}
        except Exception as error:
            import traceback

            return {"verdict": "TRACEBACK", "reason": _line(error), "trace": traceback.format_exc()[-1500:]}
    error = report.agreement.max_error
    return {
        "verdict": "right" if error <= TOLERANCE else "WRONG", "error": error, "decoding": report.decoding,
        "rows": report.rows, "lora": list(report.lora_targets), "value_head": report.value_head,
        "reason": "; ".join(report.reasons),
    }  # fmt: skip


def _line(error: Exception) -> str:
    cause = error.__cause__ if "Class validation error" in str(error) and error.__cause__ is not None else error
    return f"{type(cause).__name__}: {(str(cause).strip() or '?').splitlines()[0][:200]}"


def run_in_process(name: str, seq2seq: bool) -> dict[str, Any]:
    """Return the verdict on an architecture, from a process of its own.

    It is forked from this one, which has imported what takes seconds and computed nothing.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def inside() -> None:
        with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
            sender.send(try_architecture(name, seq2seq))

    process = context.Process(target=inside)
    process.start()
    sender.close()
    try:
        if receiver.poll(TIMEOUT):
            return receiver.recv()
        return {"verdict": "TRACEBACK", "reason": f"no end in {TIMEOUT} s"}
    except EOFError:
        process.join()
        return {"verdict": "TRACEBACK", "reason": f"the process died ({process.exitcode})"}
    finally:
        process.kill()
        process.join()


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of docs/models.md."""
    import transformers

    counts = {verdict: sum(result["verdict"] == verdict for result in results.values()) for verdict in VERDICTS}
    lines = [
        f"transformers {transformers.__version__}, {len(results)} architectures: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        + ".",
        "",
        "| model type | path | rows in training | value head | LoRA targets |",
        "|---|---|---|---|---|",
    ]
    for key, result in sorted(results.items()):
        if result["verdict"] == "right":
            path = {"own": "fast", "select": "general", "hold": "general", "uncached": "without a cache"}[result["decoding"]]
            head, layers = "yes" if result["value_head"] else "no", ", ".join(result["lora"]) or "none"
            lines.append(f"| {key} | {path} | {result['rows']} | {head} | {layers} |")
    lines += ["", "| not trained | why |", "|---|---|"]
    for key, result in sorted(results.items()):
        if result["verdict"] != "right":
            reason = result.get("reason", "").split(": choose")[0].replace("|", "\\|")
            lines.append(f"| {key} | {result['verdict']}: {reason} |")
    return "\n".join(lines)


def main() -> int:
    """Try architectures, print a line for each, and return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="model types; none: all")
    parser.add_argument("--again", action="store_true", help="try those with a result too")
    parser.add_argument("--table", action="store_true", help="write the table of docs/models.md from the results")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    if not options.table:
        import_slow_modules()
    results: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, seq2seq in [] if options.table else tiny_models.architectures():
        key = f"{name} (encoder–decoder)" if seq2seq else name
        wanted = name in options.names if options.names else key not in results
        if not wanted and not (options.again and not options.names):
            continue
        results[key] = run_in_process(name, seq2seq)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
        shown = results[key]
        told = shown.get("reason") or f"{shown['error']:.1e} {shown['decoding']} {shown['rows']}"
        print(f"{key:38s} {shown['verdict']:10s} {told[:150]}", flush=True)
    if options.table:
        before, rest = DOCS.read_text(encoding="utf-8").split(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    bad = [key for key, result in results.items() if result["verdict"] in ("WRONG", "TRACEBACK")]
    counts = {verdict: sum(result["verdict"] == verdict for result in results.values()) for verdict in VERDICTS}
    print(counts, *bad)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
