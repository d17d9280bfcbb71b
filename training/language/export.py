"""Exports an adapter as a PEFT folder, and proves that the files act as the trained weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers

from jobs.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jobs.llm import ALL_LINEAR, LlmRun
from training.language.base import LanguageBase, locate
from training.language.evaluation import evaluating
from training.language.masks import TokenRow
from utils.errors import ExportFailed

FINGERPRINT = "fingerprint.json"
CARD = "README.md"
TEMPLATE = "chat_template.jinja"
PROOFS = 8
"""Held-out prefixes whose logits the exported files must reproduce."""
PROOF_TOKENS = 256
MAX_SHARD = "5GB"
MERGED_FOLDER = "merged"
_NEEDED = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha"),
    *("target_modules", "lora_dropout", "bias", "use_rslora", "inference_mode"),
    "fan_in_fan_out",
)
"""Keys of `adapter_config.json` that every version of PEFT since 0.12 reads."""


@dataclasses.dataclass(frozen=True, slots=True)
class Proof:
    """Logits of the live model behind prefixes of held-out rows, [vocabulary] float32 each."""

    prefixes: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Merged:
    """The files of a merged model, and its difference to the trained one."""

    files: tuple[str, ...]
    facts: dict[str, Any]


def config_of(run: LlmRun) -> peft.LoraConfig:
    """PEFT's configuration of a run's adapter."""
    parameters = run.parameters
    targets = parameters.target_modules
    return peft.LoraConfig(
        r=parameters.rank,
        lora_alpha=parameters.alpha,
        lora_dropout=parameters.dropout,
        target_modules=targets if targets == ALL_LINEAR else targets.split(","),
        use_rslora=parameters.rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def prove(model: Any, rows: Sequence[TokenRow], device: torch.device) -> Proof:
    """The logits of a model behind the first rows' prompts."""
    prefixes, logits = [], []
    with evaluating(model):
        for row in rows[:PROOFS]:
            prefix = row.ids[: max(row.prompt_tokens, 1)][-PROOF_TOKENS:]
            ids = torch.tensor([prefix], device=device)
            made = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            prefixes.append(tuple(prefix))
            logits.append(made[0, -1].float().cpu())
    return Proof(tuple(prefixes), tuple(logits))


def write(model: Any, run: LlmRun, base: LanguageBase, folder: Path, card: str) -> None:
    """Write the adapter's configuration and weights, the tokenizer's template and the card.

    The files hold the base's public name and no path of this machine. Defaults are left out, so
    that older versions of PEFT read the configuration.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    given = model.peft_config["default"].to_dict()
    config = {name: given[name] for name in _NEEDED if name in given}
    config["target_modules"] = _short_names(model, config["target_modules"])
    config |= {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": run.base_model,
        "revision": base.revision,
        "inference_mode": True,
    }
    (folder / TEMPLATE).write_text(str(base.tokenizer.chat_template), encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def check(
    base: LanguageBase, folder: Path, proof: Proof, without: Proof, *, learned: bool
) -> dict[str, Any]:
    """Load the exported files on the base without an adapter, and compare the logits.

    Args:
        base: The base, without the adapter.
        folder: The exported files.
        proof: Logits of the live model.
        without: Logits of the base, which the files must not reproduce.
        learned: Whether the adapter differs from zero.

    Returns:
        The differences, for the report.

    Raises:
        ExportFailed: The files act differently.
    """
    loaded = peft.PeftModel.from_pretrained(base.model, str(folder), autocast_adapter_dtype=True)
    try:
        again = _again(loaded, proof, base.device)
    finally:
        unload(loaded, base)
    difference = _furthest(proof, again)
    effect = _furthest(proof, without)
    if difference > 1e-5 * max(1.0, _largest(proof)):
        raise ExportFailed(
            f"The exported adapter gives other logits than the trained model (by {difference:.3g})."
        )
    if learned and effect == 0.0:
        raise ExportFailed("The exported adapter has no effect on the base model.")
    return {"prefixes": len(proof.prefixes), "difference": difference, "effect": effect}


# One variable for each thing that is compared.
def merge(  # pylint: disable=too-many-locals
    run: LlmRun, base: LanguageBase, folder: Path, proof: Proof
) -> Merged:
    """Write the base with the exported adapter merged into it, next to the adapter.

    The base is read again in the precision of its files, on the CPU: an adapter merged into
    quantised weights would lose what the quantisation has lost. All files but the weights are the
    base's own, to the byte.

    Args:
        run, base: The run and its base, which stays as it is.
        folder: The exported adapter; receives the files.
        proof: Logits of the live model.

    Raises:
        ExportFailed: The merged model acts as the base does, or gives no finite logits.
    """
    source, _ = locate(run)
    cpu = torch.device("cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    model.requires_grad_(False)
    without = _again(model, proof, cpu)
    merged = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    again = _again(merged, proof, cpu)
    difference, effect = _furthest(proof, again), _furthest(without, again)
    if not math.isfinite(difference) or effect == 0.0:
        raise ExportFailed(
            f"The merged model differs from the trained one by {difference:.3g} and from the base "
            f"by {effect:.3g}. Set merged to false, or train longer."
        )
    # transformers would load the adapter of a folder that has both.
    target = folder / MERGED_FOLDER
    merged.save_pretrained(target, max_shard_size=MAX_SHARD)
    for path in _beside_weights(source):
        shutil.copyfile(path, target / path.name)
    (target / TEMPLATE).write_text(str(base.tokenizer.chat_template), encoding="utf-8")
    names = sorted(path.name for path in target.iterdir())
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(proof.logits, again.logits))
    facts = {
        "dtype": str(merged.dtype).removeprefix("torch."),
        "trained_on": base.identity.quantization,
        "difference": difference,
        "largest_logit": _largest(proof),
        "same_next_token": same,
        "prefixes": len(proof.prefixes),
    }
    return Merged(tuple(f"{MERGED_FOLDER}/{name}" for name in names), facts)


def _beside_weights(source: Path) -> list[Path]:
    """The base's files that a merged model needs, too."""
    names = (
        *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json"),
        *("*.model", "vocab.*", "merges.txt"),
    )
    found = {path for name in names for path in source.glob(name)}
    return sorted(path for path in found if path.is_file())


def _again(model: Any, proof: Proof, device: torch.device) -> Proof:
    rows = [TokenRow(0, (*prefix, 0), (*[-100] * len(prefix), 0)) for prefix in proof.prefixes]
    return prove(model, rows, device)


def unload(model: Any, base: LanguageBase) -> None:
    """Take an adapter off its base, and set the base back into its state."""
    model.unload()
    for name in ("peft_config", "_hf_peft_config_loaded", "active_adapter"):
        base.model.__dict__.pop(name, None)
    base.model.eval()
    for weight in base.model.parameters():
        weight.requires_grad_(False)


def fingerprint(run: LlmRun, base: LanguageBase, folder: Path, proof: Proof) -> dict[str, Any]:
    """Facts by which a server proves, before it answers, that it serves this adapter."""
    prompts = []
    for prefix, logits in zip(proof.prefixes, proof.logits):
        top = torch.log_softmax(logits.double(), -1).topk(5)
        prompts.append(
            {
                "token_ids": list(prefix),
                "top_token_ids": top.indices.tolist(),
                "top_logprobs": [round(value, 6) for value in top.values.tolist()],
            }
        )
    template = str(base.tokenizer.chat_template)
    return {
        "base_model": run.base_model,
        "base_revision": base.revision,
        "base_sha256": base.sha256,
        "quantization": base.identity.quantization,
        "rank": run.parameters.rank,
        "adapter_sha256": hashlib.sha256((folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest(),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "template_date": run.template_date,
        "prompts": prompts,
    }


def card_of(run: LlmRun, summary: dict[str, Any]) -> str:
    """The model card."""
    parameters = run.parameters
    before, after = summary.get("perplexity_before"), summary.get("perplexity_after")
    measured = "not measured" if after is None else f"{before:.2f} before, {after:.2f} after"
    return f"""---
base_model: {run.base_model}
library_name: peft
tags:
- lora
---

# {run.subject}

A LoRA of `{run.base_model}`, trained on {summary["rows_trained"]} conversations.

- Held-out perplexity: {measured}
- {summary["verdict"]}
- Rank {parameters.rank}, alpha {parameters.alpha:g}, {summary["steps"]} steps

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER OF THIS FILE")
```

`chat_template.jinja` is the template of the training. Set it on the tokenizer if the base's own
template differs: `tokenizer.chat_template = open("chat_template.jinja").read()`.
"""


def _short_names(model: Any, targets: Any) -> list[str]:
    """The ends of the adapted layers' names, if they mean the same layers of this model."""
    ends = sorted({name.rpartition(".")[2] for name in targets})
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    plain = [
        name
        for name, module in model.get_base_model().named_modules()
        if name.rpartition(".")[2] in ends and not name.endswith("base_layer")
    ]
    return ends if len(names) == len(plain) else sorted(targets)


def _furthest(one: Proof, other: Proof) -> float:
    pairs = zip(one.logits, other.logits, strict=True)
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def _largest(proof: Proof) -> float:
    return max((float(logits.abs().max()) for logits in proof.logits), default=0.0)
