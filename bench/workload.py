"""The workloads: inputs that all sides share byte for byte. Imports no side's library."""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Workload:
    """The sizes and settings of one PPO iteration."""

    name: str = "S"
    architecture: str = "gpt2"  # or llama, t5 (which has as many layers in its encoder as in its decoder)
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
        """Return the counts that one iteration must have, on every side."""
        return {
            "tokens_generated": self.texts * self.new_tokens,
            "tokens_trained": self.texts * self.new_tokens * self.epochs,
            "optimizer_steps_policy": self.epochs * self.texts // self.minibatch_texts,
            "optimizer_steps_critic": self.epochs * self.texts // self.minibatch_texts,
        }


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(),
        Workload(name="S-llama", architecture="llama"),
        Workload(name="S-t5", architecture="t5", layers=2),
        Workload(
            name="M",
            layers=12,
            width=768,
            heads=12,
            vocabulary=50257,
            texts=16,
            shortest_prompt=64,
            epochs=1,
            minibatch_texts=8,
        ),
    )
}


def reward(texts: Sequence[str]) -> list[float]:
    """Return the reward that all sides maximize: the share of words with an even number."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in texts]


def read_prompts(folder: Path) -> list[list[int]]:
    """Return the token ids of the prompts that `make` wrote."""
    return json.loads((folder / "prompts.json").read_text())


def make(workload: Workload, folder: Path) -> None:
    """Write prompts, tokenizer and initial weights to `folder`; all follow from the seed."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

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
    torch.manual_seed(workload.seed)
    kind = AutoModelForSeq2SeqLM if workload.architecture == "t5" else AutoModelForCausalLM
    kind.from_config(model_config(workload, end)).save_pretrained(folder / "model")


def model_config(workload: Workload, end: int) -> Any:
    """Return a transformers config of the workload's shape, without dropout; `end` is its special token."""
    from transformers import GPT2Config, LlamaConfig, T5Config

    size: dict[str, int] = {"vocab_size": workload.vocabulary, "bos_token_id": end, "eos_token_id": end}
    layers, width, heads = workload.layers, workload.width, workload.heads
    if workload.architecture == "llama":
        return LlamaConfig(
            hidden_size=width,
            intermediate_size=8 * width // 3 // 16 * 16,  # three matrices with as many weights as GPT-2's two
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=workload.context,
            tie_word_embeddings=True,
            **size,
        )
    if workload.architecture == "t5":
        return T5Config(
            d_model=width,
            d_kv=width // heads,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=heads,
            dropout_rate=0.0,
            decoder_start_token_id=end,
            pad_token_id=end,
            **size,
        )
    return GPT2Config(
        n_positions=workload.context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **size,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(WORKLOADS[arguments.workload], arguments.folder)
