"""Names of the tensors in LoRA files of several programs, and in other files."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Layer, and how the file spells the first factor of it. In order: PEFT and diffusers (also saved
# with the adapter's name), kohya, diffusers before 0.22 (three spellings), PEFT's embeddings.
_DOWN = re.compile(
    r"(.+?)("
    r"\.lora_A(?:\.default)?\.weight"
    r"|\.lora_down\.weight"
    r"|\.lora\.down\.weight"
    r"|\.lora_linear_layer\.down\.weight"
    r"|_lora\.down\.weight"
    r"|\.lora_embedding_A"
    r")"
)
_OTHER_ADAPTERS = (
    ("LoHa", re.compile(r"\.hada_[wt]\d")),
    ("LoKr", re.compile(r"\.lokr_[wt]\d")),
    ("OFT", re.compile(r"\.(?:oft_blocks|oft_diag|oft_R|boft_R)\b")),
    ("IA3", re.compile(r"\.(?:ia3_l\b|on_input$)")),
    ("VeRA", re.compile(r"\.vera_lambda_")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("weight difference", re.compile(r"\.(?:diff|diff_b)$")),
)
_MODELS = (
    ("is a ControlNet", re.compile(r"(?:control_model\.|controlnet_)")),
    ("is a whole model (checkpoint)", re.compile(r"model\.diffusion_model\.")),
    ("is a VAE", re.compile(r"(?:first_stage_model\.|decoder\.(?:up_blocks|up|mid)\b)")),
    (
        "holds the weights of a whole network",
        re.compile(r"(?:(?:down|up|mid)_blocks?|double_blocks|transformer_blocks|text_model)\."),
    ),
)
_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "t5xxl"})
_LONGEST_NAME = 80


def factor_names(name: str) -> tuple[str, str] | None:
    """The layer of a first factor and the name of the second one.

    Returns:
        None if the tensor is not the first factor of a layer.
    """
    if not (match := _DOWN.fullmatch(name)):
        return None
    layer, spelling = match.groups()
    second = spelling.replace("lora_A", "lora_B").replace("down", "up")
    return layer, layer + second.replace("embedding_A", "embedding_B")


def adapters_in(names: Iterable[str]) -> dict[str, int]:
    """The kinds of adapters other than LoRA, with the number of tensors of each."""
    counts: dict[str, int] = {}
    for name in names:
        for kind, pattern in _OTHER_ADAPTERS:
            if pattern.search(name):
                counts[kind] = counts.get(kind, 0) + 1
                break
    return counts


def file_kind(names: Iterable[str]) -> str:
    """What a file without LoRA factors is, to follow the file's name in a sentence."""
    names = sorted(names)
    if not names:
        return "holds no tensors"
    if adapters := adapters_in(names):
        return (
            f"is an adapter of another kind ({', '.join(adapters)}); inspect reads LoRA factors "
            "only"
        )
    if _EMBEDDINGS.issuperset(names) or (len(names) == 1 and "." not in names[0]):
        return "is an embedding (textual inversion), not a LoRA"
    for kind, pattern in _MODELS:
        if any(pattern.match(name) for name in names):
            return f"{kind}, not a LoRA"
    return (
        f"holds no LoRA factors that inspect knows; the first of its {len(names)} tensors is named "
        f"{names[0][:_LONGEST_NAME]!r}"
    )
