"""snparam: hold the spectral norm of a PyTorch network's weights."""

from snparam.checkpoints.save import plain_state_dict, state_dict_for
from snparam.conversion.convert import convert_model, plan_conversion
from snparam.conversion.plan import ConversionPlan
from snparam.conversion.register import register_sn, remove_sn
from snparam.conversion.restore import restore_model
from snparam.layers.register import register_layer_type
from snparam.matrices.views import Layout
from snparam.parametrization.spectral_norm import SpectralNorm
from snparam.parametrization.training import (
    cached,
    frozen,
    parameter_groups,
    update,
    update_after_step,
)
from snparam.spectrum.values import singular_values, verify
from snparam.systems import (  # noqa: F401 - these register themselves
    peft,
    pickling,
    save_pretrained,
    tied_weights,
)

__version__ = "0.1.0"

__all__ = [
    "ConversionPlan",
    "Layout",
    "SpectralNorm",
    "cached",
    "convert_model",
    "frozen",
    "parameter_groups",
    "plain_state_dict",
    "plan_conversion",
    "register_layer_type",
    "register_sn",
    "remove_sn",
    "restore_model",
    "singular_values",
    "state_dict_for",
    "update",
    "update_after_step",
    "verify",
]
