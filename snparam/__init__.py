"""snparam holds the spectral norm of a PyTorch network's weights: the public names."""

from snparam.checkpoints import load, spellings  # noqa: F401 - these register themselves
from snparam.checkpoints.optimizer_state import optimizer_state_dict_for
from snparam.checkpoints.save import plain_state_dict, state_dict_for
from snparam.constraints import (  # noqa: F401 - these register themselves
    bound,
    clip,
    fixed,
    gain,
    stable_rank,
)
from snparam.conversion.convert import convert_model
from snparam.conversion.input_sizes import record_input_sizes
from snparam.conversion.plan import ConversionPlan, plan_conversion
from snparam.conversion.register import register_sn, remove_sn
from snparam.conversion.restore import restore_model
from snparam.estimators import exact, power, rayleigh_ritz, upper  # noqa: F401 - these register themselves
from snparam.estimators.convolution_bounds import Bounds
from snparam.layers.register import register_layer_type
from snparam.matrices.views import Layout
from snparam.parametrization.attachment import weight_in_use
from snparam.parametrization.contexts import cached, frozen
from snparam.parametrization.gains import gain_parameters, parameter_groups
from snparam.parametrization.refresh import refresh
from snparam.parametrization.spectral_norm import SpectralNorm
from snparam.parametrization.update import update
from snparam.spectrum.bounds import norm_bounds
from snparam.spectrum.certify import Certificate, certify
from snparam.spectrum.penalty import SpectralPenalty, spectral_penalty
from snparam.spectrum.values import singular_values
from snparam.spectrum.verify import verify
from snparam.systems import (  # noqa: F401 - these register themselves
    assigned_parameters,
    diffusers_ema,
    peft,
    pickling,
    replaced_weights,
    reset_parameters,
    save_pretrained,
)

__version__ = "0.1.0"

__all__ = [
    "Bounds",
    "Certificate",
    "ConversionPlan",
    "Layout",
    "SpectralNorm",
    "SpectralPenalty",
    "cached",
    "certify",
    "convert_model",
    "frozen",
    "gain_parameters",
    "norm_bounds",
    "optimizer_state_dict_for",
    "parameter_groups",
    "plain_state_dict",
    "plan_conversion",
    "record_input_sizes",
    "refresh",
    "register_layer_type",
    "register_sn",
    "remove_sn",
    "restore_model",
    "singular_values",
    "spectral_penalty",
    "state_dict_for",
    "update",
    "verify",
    "weight_in_use",
]


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*__all__, "__version__"])
