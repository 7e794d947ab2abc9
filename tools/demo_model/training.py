"""The lessons of the demo model, and a run that survives being stopped.

First the tower learns to name every cell and its neighbours (`cells.py`, `neighbours.py`), then
everything learns to answer, with hints on the way (`hints.py`). The learning rate is constant and falls
linearly to nothing over the last steps, so that a run can be made longer before it has begun to fall.
Batches follow from the seed and the step: a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from .cells import reading_loss
from .data import HARD_KINDS, SINGLE_KINDS, Batch, BatchMaker, BatchShape, Pictures
from .model import make_config, new_model
from .neighbours import NeighbourProbe
from .tower import encode_all, read

_SAVE_EVERY = 50
_REPORT_EVERY = 100


@dataclass(frozen=True)
class Plan:
    """How long to learn what, in steps from the start.

    `seeing` ends the first lesson; `hard_from` begins to ask more of the hard kinds. The learning rate
    falls over the last `fall` of all `steps`.
    """

    seed: int
    steps: int
    seeing: int = 800
    hard_from: int = 2500
    fall: int = 3000
    warm_up: int = 50
    rate: float = 1.5e-3
    cells_weight: float = 0.1
    hints_weight: float = 0.3

    def rate_factor(self, step: int) -> float:
        """Return what part of the learning rate `step` gets."""
        into_lesson = step if step < self.seeing else step - self.seeing
        return min(1.0, (into_lesson + 1) / self.warm_up, (self.steps - step) / self.fall)


class Training:
    """A run whose state lives in the file `checkpoint` of `work`; a new object goes on from there."""

    def __init__(self, plan: Plan, tokenizer: PreTrainedTokenizerFast, work: Path) -> None:
        self.plan = plan
        self.model = new_model(make_config(tokenizer), plan.seed)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self._probe = NeighbourProbe(self.model.config.vision_config.hidden_size)
        self._probe_optimizer = torch.optim.AdamW(self._probe.parameters(), lr=plan.rate)
        self._batches = BatchMaker(tokenizer, plan.seed, BatchShape())
        self._checkpoint = work / "checkpoint.pt"
        self._score = _Score()
        self.step = 0
        if self._checkpoint.exists():
            self._load()

    def run(self) -> None:
        """Do the steps that are left, showing progress; save now and then and at the end."""
        with tqdm(total=self.plan.steps, initial=self.step, unit="step", smoothing=0.05) as progress:
            while self.step < self.plan.steps:
                loss = self._learn(self.step)
                self.step += 1
                progress.update()
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if self.step % _SAVE_EVERY == 0 or self.step == self.plan.steps:
                    self._save()
                if self.step % _REPORT_EVERY == 0:
                    progress.write(f"step {self.step}: loss {loss:.3f} {self._score.report()}")

    def _learn(self, step: int) -> float:
        for optimizer in (self._optimizer, self._probe_optimizer):
            optimizer.param_groups[0]["lr"] = self.plan.rate * self.plan.rate_factor(step)
            optimizer.zero_grad()
        loss = self._loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._probe_optimizer.step()
        return float(loss.detach())

    def _loss(self, step: int) -> torch.Tensor:
        if step < self.plan.seeing:
            pictures = self._batches.pictures(step)
            tokens = encode_all(self.model, pictures)
            seen = reading_loss(self.model, tokens, pictures.cells)
            return seen + self._probe.loss(self.model, tokens, pictures.neighbours)
        kinds = SINGLE_KINDS if step < self.plan.hard_from else HARD_KINDS
        batch = self._batches.batch(step, kinds)
        tokens = encode_all(self.model, batch.pictures)
        result = read(self.model, batch, tokens)
        self._score.add(batch, result.logits)
        cells = reading_loss(self.model, tokens, batch.pictures.cells)
        neighbours = self._probe.loss(self.model, tokens, batch.pictures.neighbours)
        hints = reading_loss(self.model, result.half_way, batch.hint_words)
        second_hints = reading_loss(self.model, result.later, batch.second_hint_words)
        ordinals = reading_loss(self.model, result.early, batch.ordinal_words)
        answers = functional.cross_entropy(result.logits, batch.targets)
        return (
            answers
            + self.plan.cells_weight * (cells + neighbours)
            + self.plan.hints_weight * (hints + second_hints + ordinals)
        )

    def cells_loss(self, pictures: Pictures) -> torch.Tensor:
        """Return how badly the tower's tokens for `pictures` read as their cells' words."""
        return reading_loss(self.model, encode_all(self.model, pictures), pictures.cells)

    def _save(self) -> None:
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "probe": self._probe.state_dict(),
            "probe_optimizer": self._probe_optimizer.state_dict(),
        }
        written = self._checkpoint.with_suffix(".part")
        torch.save(state, written)
        written.replace(self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._probe.load_state_dict(state["probe"])
        self._probe_optimizer.load_state_dict(state["probe_optimizer"])


class _Score:
    """Exact answers of each kind since the last report, on batches before they are learned from."""

    def __init__(self) -> None:
        self._right: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()

    def add(self, batch: Batch, logits: torch.Tensor) -> None:
        """Count an answer as right when each of its tokens is the most likely one."""
        right = (logits.argmax(-1) == batch.targets).split(batch.answer_lengths)
        for kind, tokens in zip(batch.kinds, right, strict=True):
            self._asked[kind] += 1
            self._right[kind] += bool(tokens.all())

    def report(self) -> str:
        """Return the shares, and begin anew."""
        parts = [f"{kind} {self._right[kind] / asked:.0%}" for kind, asked in sorted(self._asked.items())]
        self._right.clear()
        self._asked.clear()
        return ", ".join(parts)
