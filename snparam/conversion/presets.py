"""Presets: named choices of the weights that a conversion leaves alone.

A preset selects weights and sets no option; docs/presets.md has the source of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from snparam.layers.table import Path

PathPredicate = Callable[[Path], bool]


@dataclass(frozen=True)
class Preset:
    """A named choice of the weights that a conversion leaves alone.

    Attributes:
        summary: the words that complete "this preset leaves ...".
        rule: function of a model that returns a predicate, True where a weight is left alone. The
            predicate takes the qualified names and modules from the root of the model to the
            weight's owner, both included.
    """

    summary: str
    rule: Callable[[nn.Module], PathPredicate]


# Names of last layers in torchvision, timm, transformers and the code of papers. They count for
# children of the root alone: inside of blocks, `fc` is a layer like any other.
_HEADS = re.compile(
    r"(\w+_)?(heads?|head_dist|fc|classifiers?|score|logits|cls|qa_outputs|last_linear)(_\w+)?"
)
# Names of attention classes, such as `WindowAttention` and `Attention2d`. `CrossAttnDownBlock2D`
# must not match, because it holds convolutions; `XCA` does not match either.
_ATTENTION = re.compile(r"\w*(Attention|Attn)(Rope|Pool|V\d+|\dd)*", re.IGNORECASE)


def preset_named(name: object) -> Preset:
    """Return the preset of the given name.

    Raises:
        TypeError: if the name is no string.
        ValueError: if no preset has the name, with the names of all presets.
    """
    if not isinstance(name, str):
        raise TypeError(f"preset={name!r}: expected a name, not {type(name).__name__}")
    if name not in PRESETS:
        known = "; ".join(f"{key!r} leaves {preset.summary}" for key, preset in PRESETS.items())
        raise ValueError(f"preset={name!r} is unknown. Known are: {known}")
    return PRESETS[name]


def _leave_nothing(_: nn.Module) -> PathPredicate:
    return lambda _: False


def _is_embedding(path: Path) -> bool:
    return isinstance(path[-1][1], nn.Embedding | nn.EmbeddingBag)


def _leave_embeddings(_: nn.Module) -> PathPredicate:
    return _is_embedding


def _leave_head(model: nn.Module) -> PathPredicate:
    """Return a predicate that is True inside of the model's head.

    The head is every module that the model's own methods return as such (`_HEAD_METHODS`), and
    every child of the root that is named like one.
    """
    returned = {
        id(module) for method in _HEAD_METHODS for module in _modules_returned_by(model, method)
    }
    head_names = {name for name, _ in model.named_children() if _HEADS.fullmatch(name)}

    def is_head(path: Path) -> bool:
        return any(id(module) in returned for _, module in path) or (
            len(path) > 1 and path[1][0] in head_names
        )

    return is_head


# Methods by which models of timm and of transformers return their last layers.
_HEAD_METHODS = ("get_classifier", "get_output_embeddings")


def _modules_returned_by(model: nn.Module, method: str) -> list[nn.Module]:
    function: Any = getattr(model, method, None)
    if not callable(function):
        return []
    try:
        result = function()
    except (AttributeError, NotImplementedError, TypeError):
        # A base class has the method for models that have no such layer, too.
        return []
    results = result if isinstance(result, tuple | list) else [result]
    return [module for module in results if isinstance(module, nn.Module)]


def _leave_known_head(
    model: nn.Module, preset: str = "keep-head", others: Sequence[type[nn.Module]] = ()
) -> PathPredicate:
    """Return `_leave_head` of a model that has one.

    Args:
        model: the model.
        preset: name of the preset, for the error.
        others: types that the preset leaves alone beside the head, for the error.

    Raises:
        ValueError: if no head is recognised, with the children of the model and what to do.
    """
    is_head = _leave_head(model)
    modules = dict(model.named_modules())
    if not any(is_head(_path_of(modules, name)) for name in modules if name):
        children = ", ".join(name for name, _ in model.named_children())
        kinds = [kind for kind in others if any(isinstance(m, kind) for m in modules.values())]
        types = "".join(f"torch.nn.{kind.__name__}, " for kind in kinds)
        raise ValueError(
            f"preset={preset!r}: no head was recognised in {type(model).__name__}, whose parts "
            f"are {children or 'none'}; in place of the preset, pass exclude=[{types}'NAME'] with "
            "the name of the last layer"
        )
    return is_head


def _path_of(modules: dict[str, nn.Module], name: str) -> Path:
    parts = name.split(".")
    names = ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    return [(name, modules[name]) for name in names if name in modules]


def _leave_head_and_embeddings(model: nn.Module) -> PathPredicate:
    is_head = _leave_known_head(model, "sngp", (nn.Embedding, nn.EmbeddingBag))
    return lambda path: _is_embedding(path) or is_head(path)


def _is_attention(module: nn.Module) -> bool:
    return bool(_ATTENTION.fullmatch(type_before_parametrizations(module).__name__))


def _leave_outside_attention(_: nn.Module) -> PathPredicate:
    return lambda path: not any(_is_attention(module) for _, module in path)


PRESETS = {
    "gan-discriminator": Preset("nothing alone", _leave_nothing),
    "gan-generator": Preset("embeddings alone", _leave_embeddings),
    "keep-head": Preset("the last layer alone", _leave_known_head),
    "attention": Preset("everything outside of attention alone", _leave_outside_attention),
    "sigma-reparam": Preset("embeddings alone", _leave_embeddings),
    "sngp": Preset("embeddings and the last layer alone", _leave_head_and_embeddings),
}
