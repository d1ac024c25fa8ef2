"""The options that `register_sn` and `convert_model` share: defined, checked, documented once."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, TypeVar, cast

from snparam.constraints.constraint import CONSTRAINTS, Division
from snparam.estimators.estimate import ESTIMATORS
from snparam.parametrization.arguments import put_into_docstring

_Function = TypeVar("_Function", bound=Callable[..., Any])

_OPTIONS_DOC = """\
num_svs: how many of the largest singular values to track, at least 1. The weight is divided
    by the first. With `sigma="power"` the others are tracked only to be looked at; with
    `sigma="rayleigh-ritz"` they also help to find the first. Default 1: each further one
    makes the two products of a step wider.
num_itrs: power-iteration steps per training forward, at least 1. Default 1, as in Miyato et
    al. 2018: the weight moves less between two forwards than one step repairs.
blocks: how many matrices a weight is read as, each with a σ of its own: a number of equal
    parts of the rows (a fused q/k/v projection: 3), `"auto"` for the layer's own structure
    (groups of a convolution, gates of a recurrent layer, 3 for `in_proj_weight`), or None
    (the default): one matrix, as the classic method reads it. On a tensor of three or more
    dimensions that belongs to no known layer type, `blocks=weight.shape[0]` reads a stack
    of experts.
init: where `u` starts. `"converged"` (the default): at the singular vectors of the weight,
    deterministically, so that the first normalised weight has norm 1 and every rank and run
    agrees. `"random"`: at random orthonormal vectors drawn from torch's global generator,
    the cold start of the classic layer.
eps: floor under the norms that a step divides by, normalize(x) = x / max(‖x‖, eps), at
    least 0. The default is 0, because a norm of zero is handled exactly, so that weights of
    every scale are normalised. The classic layer has 1e-12, with which weights of σ below
    that decay to NaN; pass `eps=1e-12` for that floor.
update: when the state moves. `"forward"` (the default, the classic method): in every
    training forward. `"step"`: once after each step of any torch optimizer that trains the
    weight, for all layers together, and nothing has to be called for it. Training forwards
    then only read the state and take no matrix product, so that gradient accumulation,
    D(real) + D(fake) and checkpointing cost nothing more and agree exactly. Before the
    first step of an optimizer, and after a change of the weight that no optimizer made,
    training forwards move the state as with `"forward"`.
coeff: c, the norm to hold instead of 1: c · W / σ. `"mup"` stands for √(rows / columns)
    of the matrices that the weight is read as, the radius of the spectral scaling
    condition (Yang, Simon and Bernstein 2023); a convolution counts its kernel among the
    columns, and embeddings, which multiply nothing, are left out. Default 1.0.
soft: whether c is a bound only: W / max(1, σ / c), which leaves weights with σ ≤ c
    untouched, to the bit (SNGP, Liu et al. 2020). Default False.
gain: γ · W / σ, one γ for each matrix, that starts at σ of the weight, so that the module
    computes what it computed before. `"learned"`: γ is a Parameter (σReparam, Zhai et al.
    2023), to be given to the optimizer (see `parameter_groups`). `"fixed"`: γ is a buffer.
    None (the default): there is no γ; the norm is 1, and the module computes another
    function than before. γ of a zero matrix is 1.
clip: c, the value to which the tracked singular values above it are cut, while the rest of
    the weight stays (Brock et al. 2019, equation 4). The norm is then at most c, if no more
    than `num_svs` singular values exceed c; `verify` says by how much it misses.
    `sigma="rayleigh-ritz"` tracks close values better. None (the default): W is divided.
stable_rank: r, at least 1: the norm is 1, or c with `coeff=c`, and the stable rank
    ‖W‖_F² / σ² at most r; all singular values but the first are shrunk by one factor
    (Sanyal et al. 2020). None (the default): they are not.
sigma: how σ is found. `"power"` (the default): the classic iteration. `"rayleigh-ritz"`:
    each step also turns the `num_svs` vectors that it has found so that the first is the
    best in their span, for the same two products; with `num_svs=2` and more it follows a
    weight whose second singular value overtakes the first, which the classic order loses
    for many steps. `"exact"`: a full decomposition of the smaller Gram matrix in float64 at
    every read that computes, for small layers and tests; `num_itrs` and `eps` change
    nothing. `"upper"`: a certified bound, with which the norm of the weight in use never
    exceeds c, whatever was rounded; see docs/guarantees.md for what it costs. It goes with
    `coeff` and `soft`, and with `update="step"` is paid once a step.
constraint: what is done with σ, by the name under which a constraint is registered. None
    (the default): what `coeff`, `soft`, `gain`, `clip` and `stable_rank` say.
norm: which map σ is the norm of. `"matrix"` (the default, the classic method): the
    weight, reshaped to a matrix. `"operator"`: of torch's convolutions the convolution
    itself, at the size of the inputs that it sees, with its stride, padding, dilation and
    groups; all other weights are matrices as ever. See docs/guarantees.md."""


class Options(TypedDict, total=False):
    """Keyword options of `register_sn`, `plan_conversion` and `convert_model`.

    See `register_sn` for what each one means.
    """

    blocks: int | Literal["auto"] | None
    init: Literal["converged", "random"]
    eps: float
    update: Literal["forward", "step"]
    coeff: float | Literal["mup"]
    soft: bool
    gain: Literal["learned", "fixed"] | None
    clip: float | None
    stable_rank: float | None
    sigma: str
    constraint: str | None
    norm: Literal["matrix", "operator"]


@dataclass(frozen=True)
class Settings:
    """The options of one registration, validated, with a value for each of them."""

    num_svs: int = 1
    num_itrs: int = 1
    blocks: int | Literal["auto"] | None = None
    init: Literal["converged", "random"] = "converged"
    eps: float = 0.0
    update: Literal["forward", "step"] = "forward"
    coeff: float | Literal["mup"] = 1.0
    soft: bool = False
    gain: Literal["learned", "fixed"] | None = None
    clip: float | None = None
    stable_rank: float | None = None
    sigma: str = "power"
    constraint: str | None = None
    norm: Literal["matrix", "operator"] = "matrix"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            TypeError: for a value of a wrong type; the error names what is expected.
            ValueError: for a value that is out of range, or that is no name of a known choice.
        """
        for name in ("num_svs", "num_itrs"):
            _check_count(name, getattr(self, name))
        if self.blocks is not None and self.blocks != "auto":
            _check_count("blocks", self.blocks, " or 'auto' or None")
        if self.init not in ("converged", "random"):
            raise ValueError(f"init={self.init!r}: expected 'converged' or 'random'")
        if self.update not in ("forward", "step"):
            raise ValueError(f"update={self.update!r}: expected 'forward' or 'step'")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float):
            raise TypeError(f"eps={self.eps!r}: expected a number, not {type(self.eps).__name__}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps={self.eps!r}: expected a finite number of at least 0")
        self._check_constraint()
        self._check_norm()

    def _check_constraint(self) -> None:
        if self.coeff != "mup":
            _check_positive("coeff", self.coeff, " or 'mup'")
        if not isinstance(self.soft, bool):
            raise TypeError(f"soft={self.soft!r}: expected True or False")
        if self.gain not in (None, "learned", "fixed"):
            raise ValueError(f"gain={self.gain!r}: expected 'learned', 'fixed' or None")
        for option in _CONSTRAINT_OF:
            self._check_option_of_constraint(option)
        _check_name("sigma", self.sigma, ESTIMATORS)
        if self.constraint is not None:
            _check_name("constraint", self.constraint, CONSTRAINTS)
        takes_bounds = CONSTRAINTS[self.constraint_name].takes_bounds
        if ESTIMATORS[self.sigma].side == "above" and not takes_bounds:
            raise ValueError(
                f"sigma={self.sigma!r} with constraint={self.constraint_name!r}: the bound that it "
                "certifies is for coeff and soft alone; leave out gain and constraint, or pass "
                "another sigma"
            )
        CONSTRAINTS[self.constraint_name].check(self)

    def _check_option_of_constraint(self, option: str) -> None:
        value, name = getattr(self, option), _CONSTRAINT_OF[option]
        if value is None:
            return
        _check_positive(option, value, " or None")
        if self.constraint not in (None, name):
            raise ValueError(
                f"{option}={value!r} and constraint={self.constraint!r}: pass one of them"
            )
        if option == "stable_rank" and value < 1:
            raise ValueError(
                f"stable_rank={value!r}: expected at least 1, that of a matrix of rank 1"
            )

    def for_matrices(self, matrices: tuple[int, int, int]) -> Settings:
        """Return the options with the number that `coeff="mup"` stands for.

        Args:
            matrices: shape (b, m, n) of the stack that the weight is read as.
        """
        if self.coeff != "mup":
            return self
        return replace(self, coeff=math.sqrt(matrices[1] / matrices[2]))

    def _check_norm(self) -> None:
        if self.norm not in ("matrix", "operator"):
            raise ValueError(f"norm={self.norm!r}: expected 'matrix' or 'operator'")
        if self.norm == "matrix":
            return
        if self.blocks is not None:
            raise ValueError(
                f"norm='operator' reads a convolution as one matrix, and blocks={self.blocks!r} as "
                "several; leave out blocks, or pass norm='matrix'"
            )
        if not isinstance(CONSTRAINTS[self.constraint_name], Division):
            raise ValueError(
                f"norm='operator' with constraint={self.constraint_name!r}: what it makes of a "
                "convolution is no convolution of that size; pass a constraint that divides by σ, "
                "or norm='matrix'"
            )
        if self.coeff == "mup":
            raise ValueError(
                "norm='operator' with coeff='mup': √(rows / columns) is that of the reshaped "
                "weight; pass a number, or norm='matrix'"
            )

    @property
    def constraint_name(self) -> str:
        """Name of the constraint: `constraint` if given, else what the other options imply."""
        if self.constraint is not None:
            return self.constraint
        for option, name in _CONSTRAINT_OF.items():
            if getattr(self, option) is not None:
                return name
        return "gain" if self.gain is not None else "bound" if self.soft else "fixed"


# The constraint that each option of one constraint alone implies.
_CONSTRAINT_OF = {"clip": "clip", "stable_rank": "stable-rank"}

# torch's names for options in its own spectral_norm, for the hint in an error.
_TORCH_NAMES = {"n_power_iterations": "num_itrs"}


def settings_from(num_svs: int, num_itrs: int, options: Mapping[str, Any]) -> Settings:
    """Return the validated settings for the options that a caller passed.

    Raises:
        TypeError: for an unknown option, with the nearest known name, or a value of a wrong type.
        ValueError: for a value out of range.
    """
    known = [field.name for field in fields(Settings)]
    for name in options:
        if name not in known:
            close = [_TORCH_NAMES[name]] if name in _TORCH_NAMES else []
            close = close or difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise TypeError(f"unknown option {name!r}{hint} The options are: {', '.join(known)}")
    return Settings(num_svs, num_itrs, **options)


def documents_options(function: _Function) -> _Function:
    """Put the shared options into a function's docstring, at `{options}`, and its signature."""
    put_into_docstring(function, "options", _OPTIONS_DOC)
    signature = inspect.signature(function)
    keywords = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords += [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=field.type,
        )
        for field in fields(Settings)
        if field.name not in signature.parameters
    ]
    cast(Any, function).__signature__ = signature.replace(parameters=keywords)
    return function


def _check_name(option: str, value: object, choices: Mapping[str, object]) -> None:
    if value not in choices:
        raise ValueError(f"{option}={value!r}: expected one of {', '.join(map(repr, choices))}")


def _check_positive(option: str, value: object, alternatives: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{option}={value!r}: expected a number{alternatives}, not {type(value).__name__}"
        )
    if not 0 < value < math.inf:
        raise ValueError(f"{option}={value!r}: expected a finite number above 0{alternatives}")


def _check_count(name: str, value: object, alternatives: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name}={value!r}: expected an int{alternatives}, not {type(value).__name__}"
        )
    if value < 1:
        raise ValueError(f"{name}={value}: expected at least 1")
