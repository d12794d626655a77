"""Training by epochs: AdamW, cosine decay, early stopping on a score. ``fit`` and ``distill``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from pyroflows._distributed import draw_apart, reduced
from pyroflows.data.position import Passes
from pyroflows.training.checkpoints import Checkpoints
from pyroflows.training.compiled import prepare_compiler
from pyroflows.training.history import History
from pyroflows.training.loop import MAX_ROLLBACKS, DivergedError, Pace, Run, Schedule, scales
from pyroflows.training.state import Maybe, Number

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Settings(Pace):
    """How to train; the public functions document these.

    Attributes:
        max_epochs: the schedule's length.
        weight_decay: of AdamW, for weight matrices.
        clip: largest gradient norm.
        patience: epochs without a better score before stopping.
        compile: the loss is compiled; ask for a compiler.
        skip: leave out steps that are not finite and count them, rather than roll back.
        curves: further numbers of a line of the history, by name, asked for after each evaluation
            and shown in place of the scores.
        epsilon: of Adam, which divides each gradient by its own size. Of one that is a float32
            rounding error, torch's 1e-8 makes a full step; then the order in which rows are summed
            moves the losses of 50 steps by 1e-3.
    """

    max_epochs: int
    weight_decay: float
    clip: float
    patience: int
    compile: bool = False
    skip: bool = False
    curves: Callable[[], dict[str, float]] | None = None
    epsilon: float = 1e-5


def optimise(
    model: nn.Module,
    loss: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    evaluate: Callable[[], float] | None,
    settings: Settings,
    fabric: Fabric,
    checkpoints: Checkpoints | None = None,
    history: History | None = None,
) -> History:
    """Minimise ``loss(*batch)`` over the parameters of ``model``; the best weights stay in it.

    Args:
        model: what is trained, part of ``loss``.
        loss: a module that returns the mean loss of a batch.
        batches: one epoch each time it is iterated.
        evaluate: a score of the present weights, higher is better, the same in all processes; None
            to judge by the training loss. Its ``state_dict``, if it has one, is kept too.
        settings: how.
        fabric: where.
        checkpoints: to write, and one to go on from.
        history: an empty one to fill, with a unit of its own; by default in nats.

    Raises:
        DivergedError: losses stayed non-finite after three rollbacks.
        OSError: a checkpoint could not be written.
    """
    draw_apart(fabric)
    task = LossTask(model, loss, settings, fabric)
    schedule = Epochs(task, evaluate, settings, fabric)
    passes = Passes(batches, fabric.device)
    history = History() if history is None else history
    return Run(task, schedule, passes, settings, fabric, checkpoints, history).train()


class LossTask:
    """Minimise the mean loss of a module, on one device or many. Arguments as ``optimise``'s."""

    def __init__(
        self, model: nn.Module, loss: nn.Module, settings: Settings, fabric: Fabric
    ) -> None:
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("flow: it has no parameters that require a gradient, nothing to train")
        frozen = [p for p in model.parameters() if not p.requires_grad]
        self.buffers: list[Tensor] = [*frozen, *model.buffers()]
        if settings.compile:
            prepare_compiler(fabric.device)
            loss.compile()
        self.loss, self.settings, self.fabric = loss, settings, fabric
        self._optimiser: Any = None  # Fabric's, once it is set up

    def optimiser(self) -> torch.optim.Optimizer:
        """A fresh AdamW. Biases and scales are left alone: decay is for weight matrices."""
        decay = self.settings.weight_decay
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in self.parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        # One kernel for all; with loss scaling it would unscale gradients after they are clipped.
        fused = not scales(self.fabric) and self.fabric.device.type in ("cpu", "cuda")
        lr, epsilon = self.settings.lr, self.settings.epsilon
        made = torch.optim.AdamW(groups, lr=lr, eps=epsilon, fused=fused, foreach=not fused)
        if self._optimiser is None:
            self.loss, self._optimiser = self.fabric.setup(self.loss, made)
        else:
            self._optimiser = self.fabric.setup_optimizers(made)
        return self._optimiser

    def backward(self, batch: tuple[Any, ...]) -> Tensor:
        """The loss of a batch, its gradients in place."""
        loss: Tensor = self.loss(*self.fabric.to_device(batch))
        self.fabric.backward(loss)
        return loss.detach()

    def clip(self) -> Tensor:
        """Clip the gradients; their norm before, the same in all processes."""
        norm = self.fabric.clip_gradients(
            self.loss, self._optimiser, max_norm=self.settings.clip, error_if_nonfinite=False
        )
        return cast(Tensor, norm)


class Epochs(Schedule):
    """Epochs, a cosine, and the averaged weights judged after each. Arguments as ``optimise``'s."""

    def __init__(
        self,
        task: LossTask,
        evaluate: Callable[[], float] | None,
        settings: Settings,
        fabric: Fabric,
    ) -> None:
        self.task, self.evaluate, self.settings, self.fabric = task, evaluate, settings, fabric
        self.total, self.skips = settings.max_epochs, settings.skip
        self.since_best = 0
        self._sums = _Sums()
        self._place: tuple[int, int | None] = 0, None  # batches gone of how many

    def batches(self) -> Iterator[Any]:
        """One pass over them."""
        passes = self.run.passes
        self.task.loss.train()
        try:
            count = len(passes.batches)
        except TypeError:  # a stream
            count = None
        for batch in passes:
            self._place = passes.position - 1, count
            yield batch
        if not self._sums.seen:
            raise ValueError("x: the data loader gave no batch")

    def share(self) -> float:
        """Half a cosine from one to zero."""
        gone, count = self._place
        done = self.done + (gone / count if count else 0.0)
        return 0.5 * (1 + math.cos(math.pi * (done / self.total)))

    def add(self, loss: Tensor | float, batch: Any, /) -> None:
        """Take in the loss of a step."""
        first = batch[0]
        self._sums.seen += 1
        self._sums.add(loss, len(first) if isinstance(first, Tensor) else 1)

    def skipped(self) -> None:
        """A step was left out: the data were not empty all the same."""
        self._sums.seen += 1

    def judge(self) -> bool:
        """Score the averaged weights, and keep them where they are the best."""
        run = self.run
        self.task.loss.eval()
        with run.average.in_place():
            train, val = self._sums.mean(self.fabric), None
            good = math.isfinite(train) and _all_finite(self.task.parameters)
            if good and self.evaluate is not None:
                val = self.evaluate()
                good = math.isfinite(val)
            if good:
                curves = self.settings.curves() if self.settings.curves else None
                better = run.record(self.done, train, val, curves)
                self.since_best = 0 if better else self.since_best + 1
        self.done += 1
        self._sums = _Sums()
        return good

    def progress(self, within: bool = False) -> float | None:
        """Epochs done, with the share of the present one; None within one of unknown length."""
        if not within:
            return float(self.done)
        gone, count = self._place[0] + 1, self._place[1]
        return self.done + gone / count if count and gone < count else None

    def end(self) -> str:
        """Why training is over, in words; none while it is not."""
        patience, counted = self.settings.patience, self.run.history.counted
        if self.evaluate is not None and self.since_best >= patience:
            return f"no better score for {patience} {counted}s"
        return f"all {self.total} {counted}s done" if self.done >= self.total else ""

    def finish(self) -> None:
        """The best weights stay."""
        self.run.best.restore()

    def facts(self) -> dict[str, str]:
        """The last of the curves, or where there are none the last scores and the best."""
        history = self.run.history
        if history.curves:
            return {name: f"{values[-1]:.3f}" for name, values in history.curves.items()}
        scores = {"train": f"{history.train[-1]:.3f}"}
        if history.val:
            scores["val"] = f"{history.val[-1]:.3f}"
        scores["best"] = f"{history.score:.3f} {history.unit}"
        return scores

    def give_up(self) -> NoReturn:
        """Say what was tried, and what may help."""
        history = self.run.history
        history.stopped = "diverged"
        kept = "the best weights found" if history.steps else "the weights it came with"
        raise DivergedError(
            f"the loss was not finite, also after {min(history.rollbacks, MAX_ROLLBACKS)} "
            f"rollbacks, the last with a step size of {self.run.lr:.2g}. The flow holds {kept} "
            f"({len(history.steps)} good epochs). Try a smaller lr=, a smaller clip=, "
            "flow.double(), a smaller bound= in the builder, or look for extreme rows"
        )

    def rolled_back(self) -> None:
        """Epochs go on as they were."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where it is; the sums and what judges are each process's own."""
        judge: dict[str, Any] = getattr(self.evaluate, "state_dict", dict)()
        shared = {"done": self.done, "since_best": self.since_best}
        return shared, {"sums": vars(self._sums), "judge": judge}

    def pattern(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both of these look like."""
        shared, apart = self.state_dict()
        sums = {"total": Maybe(Number()), "rows": 0, "seen": 0}
        return shared, {**apart, "sums": sums}

    def load_state_dict(self, shared: dict[str, Any], apart: dict[str, Any] | None, /) -> None:
        """Go on from there."""
        self.done, self.since_best = shared["done"], shared["since_best"]
        if apart is None:
            return
        self._sums = _Sums(**apart["sums"])
        load = getattr(self.evaluate, "load_state_dict", None)
        if apart["judge"] and load is not None:
            load(apart["judge"])


@dataclass
class _Sums:
    """The training loss so far in an epoch."""

    total: Tensor | None = None
    rows: int = 0
    seen: int = 0

    def add(self, loss: Tensor | float, rows: int) -> None:
        part = torch.as_tensor(loss) * rows
        self.total = part if self.total is None else self.total.to(part.device) + part
        self.rows += rows

    def mean(self, fabric: Fabric) -> float:
        """The mean score over all processes; NaN where no step was finite."""
        if self.total is None:
            return math.nan
        total = self.total.double().to(fabric.device)
        pair = torch.stack([total, torch.full_like(total, self.rows)])
        pair = reduced(fabric, pair, "sum")
        return -(pair[0] / pair[1]).item()


def _all_finite(parameters: list[Tensor]) -> bool:
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(p.detach()) for p in parameters]
        return bool(torch.isfinite(torch.stack(norms)).all())
