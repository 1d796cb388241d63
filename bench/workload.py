"""Workload S: what both sides are given, byte for byte. Runs in both environments, so it knows neither side."""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """The numbers of one PPO iteration."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    context: int = 128
    texts: int = 64
    shortest_prompt: int = 16
    longest_prompt: int = 64
    new_tokens: int = 48
    epochs: int = 4
    minibatch_texts: int = 16
    temperature: float = 1.0
    learning_rate: float = 1e-5
    kl_coefficient: float = 0.05
    clip: float = 0.2
    value_clip: float = 0.2
    value_coefficient: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    seed: int = 0

    @property
    def expected(self) -> dict[str, int]:
        """What one iteration must count, on either side."""
        return {
            "tokens_generated": self.texts * self.new_tokens,
            "tokens_trained": self.texts * self.new_tokens * self.epochs,
            "optimizer_steps_policy": self.epochs * self.texts // self.minibatch_texts,
            "optimizer_steps_critic": self.epochs * self.texts // self.minibatch_texts,
        }


def reward(texts: Sequence[str]) -> list[float]:
    """The cheap Python function that both sides maximise: the share of words with an even number."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in texts]


def read_prompts(folder: Path) -> list[list[int]]:
    """The token ids of the prompts, as `make` wrote them."""
    return json.loads((folder / "prompts.json").read_text())


def make(workload: Workload, folder: Path) -> None:
    """Write prompts, tokenizer and initial weights to `folder`; all follow from the seed."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    draws = random.Random(workload.seed)
    end = workload.vocabulary - 1
    lengths = [draws.randint(workload.shortest_prompt, workload.longest_prompt) for _ in range(workload.texts)]
    prompts = [[draws.randrange(end) for _ in range(length)] for length in lengths]
    (folder / "prompts.json").write_text(json.dumps(prompts))

    words: dict[str, int] = {f"w{number}": number for number in range(end)} | {"<end>": end}
    words_to_ids: Any = Tokenizer(models.WordLevel(words, unk_token="w0"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words_to_ids, eos_token="<end>").save_pretrained(folder / "model")
    config = GPT2Config(
        vocab_size=workload.vocabulary,
        n_positions=workload.context,
        n_embd=workload.width,
        n_layer=workload.layers,
        n_head=workload.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(workload.seed)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make(Workload(), parser.parse_args().folder)
