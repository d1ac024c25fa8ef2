"""The shared options: what is refused, and how it is said."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import snparam


@pytest.mark.parametrize("call", [snparam.register_sn, snparam.convert_model])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_svs": 0}, ValueError, "num_svs=0: expected at least 1"),
        ({"num_svs": 1.0}, TypeError, "num_svs=1.0: expected an int"),
        ({"num_svs": True}, TypeError, "num_svs=True: expected an int"),
        ({"num_itrs": -1}, ValueError, "num_itrs=-1: expected at least 1"),
        ({"num_itrs": "2"}, TypeError, "num_itrs='2': expected an int"),
        ({"blocks": 0}, ValueError, "blocks=0"),
        ({"blocks": "gates"}, TypeError, "blocks='gates'.*'auto'"),
        ({"init": "cold"}, ValueError, "init='cold': expected 'converged' or 'random'"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"eps": float("inf")}, ValueError, "eps=inf"),
        ({"eps": None}, TypeError, "eps=None"),
        ({"update": "epoch"}, ValueError, "update='epoch': expected 'forward' or 'step'"),
        ({"block": 2}, TypeError, "unknown option 'block'; did you mean 'blocks'"),
        ({"zzz": 2}, TypeError, "unknown option 'zzz'.*blocks, init, eps"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_before_anything_changes(
    call: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(error, match=message):
        call(layer, **options)
    assert type(layer) is nn.Linear
