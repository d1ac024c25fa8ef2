"""snparam: hold the spectral norm of a PyTorch network's weights."""

from .checkpoints import plain_state_dict, state_dict_for
from .conversion import convert_model, plan_conversion, restore_model
from .layertypes import register_layer_type
from .parametrization import SpectralNorm
from .plan import ConversionPlan
from .registration import register_sn, remove_sn
from .spectrum import singular_values, verify
from .training import cached, frozen, parameter_groups, update, update_after_step
from .views import Layout

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
