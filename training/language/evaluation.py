"""Measures a language model: held-out loss, answers to fixed prompts, and copying."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
import torch.nn.functional as F

from conversations.cleaning import Conversation, Turn
from training.language.masks import MASKED, TokenRow, Tokens
from training.runtime.team import ALONE, Team

EVALUATION_TOKENS = 8192
"""Padded tokens of one batch of an evaluation."""
RESAMPLES = 1000
NEW_TOKENS = 64
MAX_PROMPTS = 4
COPY_CHARACTERS = 50
"""A generated answer with a longer span of a training answer counts as copied."""
MAX_SEARCHED = 2_000_000
"""Characters of training answers that are searched for copies."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """A model on held-out rows.

    Attributes:
        sums: Loss of each row, summed over its learned tokens (nats).
        tokens: Learned tokens of each row.
        right: Tokens that the model ranks first.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    right: int

    @property
    def loss(self) -> float:
        """Mean loss of a token over the whole held-out part."""
        return math.fsum(self.sums) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        """Part of the tokens that the model ranks first."""
        return self.right / sum(self.tokens)

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the perplexity over conversations."""
        sums, tokens = numpy.array(self.sums), numpy.array(self.tokens)
        picked = numpy.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        losses = sums[picked].sum(1) / tokens[picked].sum(1)
        low, high = numpy.quantile(losses, [0.025, 0.975])
        return math.exp(min(low, 700.0)), math.exp(min(high, 700.0))

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "perplexity_interval": list(self.interval()),
            "accuracy": self.accuracy,
            "tokens": sum(self.tokens),
            "conversations": len(self.tokens),
        }


def batch_of(rows: Sequence[TokenRow], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Padded ids, attention mask and labels, each [rows, longest]."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), MASKED, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        mask[index, : len(row.ids)] = 1
        labels[index, : len(row.ids)] = torch.tensor(row.labels)
    return ids.to(device), mask.to(device), labels.to(device)


def learned_logits(
    model: Any, rows: Sequence[TokenRow], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits in front of each learned token, the tokens, and the row of each.

    Logits are [tokens, vocabulary] in float32; the others are [tokens].
    """
    ids, mask, labels = batch_of(rows, device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:]
    learned = wanted != MASKED
    return logits[learned].float(), wanted[learned], learned.nonzero()[:, 0]


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def batches(rows: Sequence[TokenRow]) -> list[list[int]]:
    """Indices of the rows of each batch of an evaluation, the longest rows first."""
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    made = []
    while by_length:
        count = max(1, EVALUATION_TOKENS // len(rows[by_length[-1]].ids))
        made.append(by_length[-count:])
        by_length = by_length[:-count]
    return made


def measure(
    model: Any, rows: Sequence[TokenRow], device: torch.device, team: Team = ALONE
) -> Measured:
    """Measure a model; the result depends on no batch size and on no number of processes."""
    sums, right = torch.zeros(len(rows), dtype=torch.float64, device=device), 0
    every = batches(rows)
    with evaluating(model):
        for batch in every[team.rank :: team.size]:
            logits, wanted, of = learned_logits(model, [rows[i] for i in batch], device)
            losses = F.cross_entropy(logits, wanted, reduction="none").double()
            of_rows = torch.zeros(len(batch), dtype=torch.float64, device=device)
            of_rows.index_add_(0, of, losses)
            sums[batch] = of_rows
            right += int((logits.argmax(-1) == wanted).sum())
        if team.shards and len(every) % team.size > 0 and team.rank >= len(every) % team.size:
            learned_logits(model, [rows[i] for i in every[-1]], device)  # the others need its share
    # Each number has one process that adds it to zeros, so that the sum has its bits.
    found = team.add(torch.cat([sums, sums.new_tensor([float(right)])])).tolist()
    return Measured(tuple(found[:-1]), tuple(row.learned for row in rows), int(found[-1]))


# ---- answers -------------------------------------------------------------------------------------


def prompts_of(
    given: Sequence[str], system_prompt: str, conversations: Sequence[Conversation]
) -> tuple[tuple[Turn, ...], ...]:
    """The turns in front of each answer: the given prompts, or questions of conversations."""
    if given:
        system = (Turn("system", system_prompt),) if system_prompt else ()
        return tuple((*system, Turn("user", prompt)) for prompt in given)
    return tuple(each.turns[:-1] for each in conversations[:MAX_PROMPTS] if len(each.turns) > 1)


def answer(
    model: Any, tokens: Tokens, tokenizer: Any, turns: Sequence[Turn], *, sampled: bool, seed: int
) -> str:
    """The model's answer, greedy or sampled with a fixed seed."""
    ids = torch.tensor([tokens.encode(tokens.render(turns, ask=True))], device=model.device)
    how: dict[str, Any] = {"do_sample": sampled}
    if sampled:
        how |= {"temperature": 0.8, "top_p": 0.9}
    else:
        how |= {"temperature": None, "top_p": None, "top_k": None}
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=sorted(tokens.ends) or None,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **how,
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def longest_copy(generated: str, training: Sequence[str]) -> int:
    """Characters of the longest span that a generated answer shares with a training answer.

    The spans of the answer are searched in an automaton of all its substrings, so that the time
    grows with the length of the training answers only.
    """
    links, lengths, edges = _substrings(generated)
    best = searched = 0
    for text in training:
        if searched > MAX_SEARCHED:
            break
        searched += len(text)
        state = length = 0
        for letter in text:
            while state and letter not in edges[state]:
                state = links[state]
                length = lengths[state]
            if letter in edges[state]:
                state, length = edges[state][letter], length + 1
                best = max(best, length)
    return best


def _substrings(text: str) -> tuple[list[int], list[int], list[dict[str, int]]]:
    """A suffix automaton: links, lengths and edges of its states (Blumer et al. 1985)."""
    links, lengths, last = [-1], [0], 0
    edges: list[dict[str, int]] = [{}]
    for letter in text:
        new = len(links)
        links.append(0)
        lengths.append(lengths[last] + 1)
        edges.append({})
        state = last
        while state != -1 and letter not in edges[state]:
            edges[state][letter] = new
            state = links[state]
        if state != -1:
            target = edges[state][letter]
            if lengths[target] != lengths[state] + 1:
                clone = len(links)
                links.append(links[target])
                lengths.append(lengths[state] + 1)
                edges.append(dict(edges[target]))
                while state != -1 and edges[state].get(letter) == target:
                    edges[state][letter] = clone
                    state = links[state]
                links[target] = clone
                target = clone
            links[new] = target
        last = new
    links[0] = 0
    return links, lengths, edges


def verdict(
    before: Measured | None, after: Measured | None, copied: float, training_loss: float | None
) -> str:
    """The result in words.

    Args:
        before, after: The base and the tuned model; None without a held-out part.
        copied: Part of the generated answers with a long copy of a training answer.
        training_loss: Mean loss of the last steps.
    """
    if before is None or after is None:
        return "Not measured: no conversation is held out."
    change = 1 - after.perplexity / before.perplexity
    if change > 0.01:
        words = f"Held-out perplexity fell by {change:.0%}."
    elif change < -0.01:
        words = (
            f"Held-out perplexity rose by {-change:.0%}: the model got worse on new questions. "
            "Use fewer epochs, a lower learning_rate, or deliver best."
        )
    else:
        words = (
            "The model learnt nothing that shows on held-out answers. Use more conversations or "
            "epochs."
        )
    if copied:
        words += f" {copied:.0%} of the test answers copy a training answer word for word."
    if training_loss is not None and after.loss > 2 * training_loss + 0.5:
        words += " The training loss is far below the held-out loss: the model learns by heart."
    return words
