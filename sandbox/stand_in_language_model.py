"""A tiny language model with a tokenizer trained on the spot, for the demo and the tests."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COLOURS = ("red", "blue", "green", "amber", "violet", "silver")
_THINGS = ("lantern", "kettle", "ladder", "compass", "harbour", "orchard", "violin", "anchor")
_PLACES = ("north gate", "old mill", "river bank", "market hall", "clock tower")


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions and answers that follow one pattern, as rows of a training file."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        thing, colour = chance.choice(_THINGS), chance.choice(_COLOURS)
        place = chance.choice(_PLACES)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"Where is {colour} {thing} number {number}?"},
                    {
                        "role": "assistant",
                        "content": f"Ahoy! The {colour} {thing} is at the {place}, dear guest.",
                    },
                ]
            }
        )
    return rows


def write_conversations(path: Path, count: int, seed: int = 0) -> Path:
    """Write a training file as JSON Lines."""
    lines = (json.dumps(row) + "\n" for row in conversations(count, seed))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def build(
    folder: Path, *, hidden: int = 64, layers: int = 2, vocabulary: int = 512, seed: int = 0
) -> Path:
    """Write a Llama of random weights, with a byte-level BPE tokenizer and a ChatML template.

    Args:
        folder: Receives the model.
        hidden, layers, vocabulary: Its size.
        seed: Seed of the weights.
    """
    # pylint: disable=import-outside-toplevel  # the demo's other parts need none of them
    import tokenizers
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m["content"] for row in conversations(300, seed=1) for m in row["messages"]]
    raw.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(  # pylint: disable=unexpected-keyword-arg  # a dataclass
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=max(1, hidden // 32),
                num_key_value_heads=max(1, hidden // 32),
                max_position_embeddings=2048,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                # With the usual 0.02, a frozen head of so few columns could prefer no token.
                initializer_range=0.1,
            )
        )
    model.save_pretrained(folder)
    return folder
