"""The demo: a network is converted, trained, inspected and restored, and each claim is checked.

A vision transformer from transformers, built from a small configuration with random weights, is
converted and trained on scikit-learn's handwritten digits (1797 images of 8 × 8 pixels, which
ship inside that package). Nothing is downloaded. Every number printed is measured in the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from snparam.conversion.convert import convert_model
from snparam.conversion.plan import plan_conversion
from snparam.conversion.restore import restore_model
from snparam.spectrum.plotting import plot_confusion_matrix, plot_singular_values
from snparam.spectrum.values import singular_values
from snparam.spectrum.verify import verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn
    from tqdm import tqdm

    from snparam.spectrum.verify import Verification, VerificationRow

__all__ = ["Check", "Result", "run"]

# Distribution name -> import name, of each library that the extra `demo` installs.
_NEEDS = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "rich": "rich",
    "scikit-learn": "sklearn",
    "tqdm": "tqdm",
    "transformers": "transformers",
}

NUM_SVS = 3
BATCH_SIZE = 64
LEARNING_RATE = 8e-3

# What registration promises: right after it, σ̂ is within 1e-3 of σ.
TOLERANCE_CONVERTED = 1e-3
# One power step per training forward lags behind a weight that moves: early in training the norm of
# the worst weight can be 0.2 away from 1, while its largest singular values change places; the run
# measures and prints that. The learning rate ends at zero, so that the estimate has converged by
# the end: the worst of 15 runs (5 seeds; 1, 2 and 20 epochs) was 1e-2.
TOLERANCE_TRAINED = 5e-2


@dataclass(frozen=True)
class Check:
    """A claim about the run, the measurement, and whether the measurement supports the claim."""

    claim: str
    measured: str
    passed: bool


@dataclass(frozen=True)
class Result:
    """The result of a run: its checks, the accuracy on the test images, and the files written."""

    checks: tuple[Check, ...]
    accuracy: float
    test_images: int
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class _Digits:
    """The data set: images (n, 1, 8, 8), standardised by the training images' mean and deviation.

    Labels have the shape (n,).
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class _Training:
    """The records of the training.

    Attributes:
        losses: the loss of each step.
        history: qualified weight name -> its tracked singular values (steps, b, NUM_SVS).
        worst_drift: the row of `verify` with the largest drift at the end of any epoch, and that
            epoch, counted from 1.
    """

    losses: list[float]
    history: dict[str, Tensor]
    worst_drift: tuple[VerificationRow, int]


def run(out: Path, *, epochs: int = 20, seed: int = 0, quiet: bool = False) -> Result:
    """Run the demo and write its two pictures into ``out``, which is created where needed.

    Args:
        out: the directory for ``singular_values.png`` and ``confusion.png``.
        epochs: passes over the training images.
        seed: seed of the split, the weights and the order of the images. The caller's global
            random state and number of threads are put back afterwards.
        quiet: whether to print no tables and no progress bar.

    Raises:
        ImportError: if a library of the extra ``demo`` is not installed.
        OSError: if ``out`` cannot be created or written.
    """
    _require_extras()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which then asks no hub
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        return _run(out, epochs, seed, _Narrator(quiet))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute in one thread.

    Matrices as small as the demo's gain nothing from a second one, and on a busy machine wait for
    it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, epochs: int, seed: int, say: _Narrator) -> Result:
    digits = _load_digits(seed)
    model, fresh = _vision_transformer(), _vision_transformer()

    # The classifier is not converted: its weight scales the logits, which need no bound.
    exclude = ["classifier"]
    say.heading("Plan: what the conversion will do")
    say.line(str(plan_conversion(model, num_svs=NUM_SVS, exclude=exclude)))

    model = convert_model(model, num_svs=NUM_SVS, exclude=exclude)
    report_converted = verify(model)
    say.heading("Estimated against exact singular values, right after the conversion")
    say.report(report_converted)
    say.line(_tracked_against_exact(model))

    say.heading(f"Training: {len(digits.train_images)} images, {epochs} epochs")
    started = time.perf_counter()
    training = _train(model, digits, epochs, say)
    worst, epoch = training.worst_drift
    say.line(
        f"{len(training.losses)} steps in {time.perf_counter() - started:.1f} s; the largest drift "
        f"at the end of an epoch was {worst.drift:.1e} ({worst.weight}, epoch {epoch})"
    )

    model.eval()
    report_trained = verify(model)
    say.heading("Estimated against exact singular values, after training")
    say.report(report_trained)
    say.line(_tracked_against_exact(model))

    converted_logits = _logits(model, digits.test_images)
    model = restore_model(model, bake=True)
    restored_logits = _logits(model, digits.test_images)
    fresh.load_state_dict(model.state_dict(), strict=False)  # `_check_plain` checks the keys
    fresh_logits = _logits(fresh.eval(), digits.test_images)

    predicted = restored_logits.argmax(1)
    accuracy = (predicted == digits.test_labels).double().mean().item()
    checks = (
        _check_close_to_one(
            "after the conversion, exact σ of the weights in use",
            report_converted,
            TOLERANCE_CONVERTED,
        ),
        _check_close_to_one(
            "after training, exact σ of the weights in use", report_trained, TOLERANCE_TRAINED
        ),
        _check_loss_fell(training.losses),
        _check_same(
            "restored model against converted model, outputs", restored_logits, converted_logits
        ),
        _check_plain(model, fresh),
        _check_same(
            "fresh model that loads the restored weights, outputs", fresh_logits, restored_logits
        ),
    )

    pictures = (out / "singular_values.png", out / "confusion.png")
    plot_singular_values(
        training.history,
        title=f"Tracked singular values while a vision transformer learns digits (seed {seed})",
    ).savefig(pictures[0], dpi=110)
    plot_confusion_matrix(
        _confusion(digits.test_labels, predicted, classes=10),
        title=f"{len(predicted)} test images, {accuracy:.1%} correct",
    ).savefig(pictures[1], dpi=130)
    return Result(checks, accuracy, len(predicted), pictures)


# --- the data, the model, the training loop ------------------------------------------------------


def _load_digits(seed: int) -> _Digits:
    """Load scikit-learn's digits, with a quarter of each class held out for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, random_state=seed, stratify=data.target
    )
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return _Digits(images[train], labels[train], images[test], labels[test])


def _vision_transformer() -> nn.Module:
    """Build a vision transformer for 8 × 8 images in one channel: 16 patches, three layers."""
    _hide_broken_torchvision()
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def _hide_broken_torchvision() -> None:
    """Hide from transformers a torchvision that was built for another torch.

    The demo does not need torchvision, but transformers imports it where it is installed.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:  # "operator torchvision::nms does not exist"
        sys.modules["torchvision"] = None  # type: ignore[assignment]


def _train(model: nn.Module, digits: _Digits, epochs: int, say: _Narrator) -> _Training:
    """Train a model in place by an ordinary loop that also records losses, σ and drift."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    steps = epochs * -(-len(digits.train_images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    records: dict[str, list[Tensor]] = {name: [] for name in singular_values(model)}
    worst: list[tuple[VerificationRow, int]] = []
    model.train()
    with say.progress(steps) as bar:
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(digits.train_images))
            for batch in torch.split(order, BATCH_SIZE):
                loss = model(
                    pixel_values=digits.train_images[batch], labels=digits.train_labels[batch]
                ).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                for name, values in singular_values(model).items():
                    records[name].append(values)
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
            worst.append((max(verify(model), key=_drift), epoch))
    history = {name: torch.stack(values) for name, values in records.items()}
    return _Training(losses, history, max(worst, key=lambda pair: _drift(pair[0])))


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return a model's logits (n, 10) for images (n, 1, 8, 8)."""
    logits: Tensor = model(pixel_values=images).logits
    return logits


def _confusion(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Return the confusion matrix (classes, classes) of counts; rows are the true classes."""
    return torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)


@torch.no_grad()
def _tracked_against_exact(model: nn.Module) -> str:
    """Return a sentence that compares the tracked singular values with the exact ones.

    The exact ones are those of the originals, by a decomposition in float64.
    """
    worst = torch.zeros(NUM_SVS, dtype=torch.float64)
    tracked = singular_values(model)
    for name, values in tracked.items():
        module, _, tensor = name.rpartition(".")
        # This network has linear layers and one convolution, whose rows are axis 0.
        original = model.get_parameter(f"{module}.parametrizations.{tensor}.original")
        exact = torch.linalg.svdvals(original.flatten(1).double())[:NUM_SVS]
        worst = worst.maximum((values[0].double() / exact - 1).abs())
    listed = ", ".join(f"σ{i + 1} {value:.1e}" for i, value in enumerate(worst.tolist()))
    return (
        f"Tracked values of all {len(tracked)} weights, as the last step stored them, against the "
        f"singular values of the originals in float64;\nlargest relative difference: {listed}"
    )


# --- the checks ----------------------------------------------------------------------------------


def _check_close_to_one(claim: str, report: Verification, tolerance: float) -> Check:
    worst = max(report, key=_drift)
    return Check(
        f"{claim} is 1 within {tolerance:g}",
        f"at most {worst.drift:.1e} away ({worst.weight})",
        worst.drift <= tolerance,
    )


def _drift(row: VerificationRow) -> float:
    return row.drift


def _check_loss_fell(losses: Sequence[float]) -> Check:
    window = max(1, min(10, len(losses) // 2))
    first, last = sum(losses[:window]) / window, sum(losses[-window:]) / window
    return Check(
        "the converted model learns, training loss", f"{first:.3f} -> {last:.3f}", last < first
    )


def _check_same(claim: str, outputs: Tensor, expected: Tensor) -> Check:
    difference = (outputs - expected).abs().max().item()
    return Check(claim, f"max |difference| = {difference:g}", difference == 0)


def _check_plain(model: nn.Module, fresh: nn.Module) -> Check:
    """Check that a restored model has the classes and keys of a fresh one, and has no hooks."""
    differences = [
        f"{name or 'the model'} is a {type(module).__name__}, not a {type(twin).__name__}"
        for (name, module), twin in zip(model.named_modules(), fresh.modules(), strict=False)
        if type(module) is not type(twin)
    ]
    differences += sorted(model.state_dict().keys() ^ fresh.state_dict().keys())
    differences += [f"hook on {name}" for name in _modules_with_hooks(model)]
    return Check(
        "restored model has the classes and state_dict keys of a fresh one, and no hooks",
        ", ".join(differences) or f"{len(fresh.state_dict())} keys, nothing left over",
        not differences,
    )


def _modules_with_hooks(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
        )
        if any(hooks):
            yield name


# --- what the reader sees ------------------------------------------------------------------------


class _Narrator:
    """The demo's output: text on stdout and a progress bar on stderr, or neither when quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def heading(self, text: str) -> None:
        if not self.quiet:
            print(f"\n{text}\n", flush=True)

    def line(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def report(self, report: Verification) -> None:
        """Print a report as a rich table on a terminal, as aligned plain text elsewhere."""
        if self.quiet:
            return
        if not sys.stdout.isatty():
            print(report, flush=True)
            return
        from rich.console import Console
        from rich.table import Table

        table = Table()
        table.add_column("weight", overflow="fold")  # two truncated names could be equal
        table.add_column("shape")
        for heading in ("estimated σ", "σ in use", "drift"):
            table.add_column(heading, justify="right")
        for row in report:
            shape = "×".join(str(size) for size in row.shape)
            numbers = f"{row.estimate:.6g}", f"{row.exact:.6f}", f"{row.drift:.1e}"
            table.add_row(row.weight, shape, *numbers)
        Console().print(table)

    def progress(self, steps: int) -> tqdm[None]:
        from tqdm import tqdm

        # A terminal redraws one line; a log file would get a new one each time.
        interval = 0.1 if sys.stderr.isatty() else 5.0
        return tqdm(
            total=steps, desc="training", unit="step", disable=self.quiet, mininterval=interval
        )


def _require_extras() -> None:
    missing = [name for name, module in _NEEDS.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install 'snparam[demo]'")
