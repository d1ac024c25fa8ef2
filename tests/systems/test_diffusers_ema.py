"""diffusers' `EMAModel` on a converted network: refused where it would write something wrong."""

import copy
import gc

import pytest
import torch
from torch import nn

import snparam
from snparam.testing import assert_same_function

pytest.importorskip("diffusers")
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.training_utils import EMAModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def model_class():
    """A class of its own for each test, because a converted network of it is known while it lives.

    Without biases, all Parameters of a converted network fit into an ordinary one by position.
    """

    class Net(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, bias=False):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=bias), nn.Linear(8, 2, bias=bias)

        def forward(self, x):
            return self.b(self.a(x).relu())

    return Net


def train(model, ema):
    optimizer = torch.optim.SGD(model.parameters(), 0.03)
    for _ in range(3):
        model.train()(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
def test_saving_an_average_is_refused_and_what_to_do_instead_is_right(bias, tmp_path):
    Net = model_class()
    model = snparam.convert_model(Net(bias=bias))
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=Net, model_config=model.config)
    train(model, ema)
    with pytest.raises(RuntimeError, match=r"ema\.copy_to\(average\.parameters\(\)\)"):
        ema.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())

    average = copy.deepcopy(model)
    ema.copy_to(average.parameters())
    average.save_pretrained(tmp_path)
    loaded = Net.from_pretrained(tmp_path)
    assert_same_function(loaded, average, torch.randn(3, 4))
    for layer, mean in zip((loaded.a, loaded.b), (average.a, average.b), strict=True):
        original = mean.parametrizations.weight.original.detach()
        exact = original / torch.linalg.matrix_norm(original.double(), 2)
        torch.testing.assert_close(layer.weight.detach(), exact.float(), rtol=0, atol=1e-2)


class Terse(EMAModel):
    """One that does not configure the model that it makes."""

    def save_pretrained(self, path):
        model = self.model_cls()
        self.copy_to(model.parameters())
        model.save_pretrained(path)


def test_it_is_refused_before_anything_is_written_at_the_latest(tmp_path):
    Net = model_class()
    model = snparam.convert_model(Net())
    ema = Terse(model.parameters(), model_cls=Net, model_config=model.config)
    with pytest.raises(RuntimeError, match="converted Net"):
        ema.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_average_that_began_with_an_ordinary_model_is_refused_too(tmp_path):
    """As in diffusers' own training scripts, which load the model twice."""
    Net = model_class()
    model, other = snparam.convert_model(Net()), Net()
    ema = EMAModel(other.parameters(), model_cls=Net, model_config=other.config)
    train(model, ema)
    with pytest.raises(RuntimeError, match="converted Net"):
        ema.save_pretrained(tmp_path)


@pytest.mark.parametrize("how", ["restored", "gone"])
def test_an_average_outlives_the_converted_network(how, tmp_path):
    Net = model_class()
    model = snparam.convert_model(Net())
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=Net, model_config=model.config)
    train(model, ema)
    if how == "restored":
        snparam.restore_model(model)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="converted again, if it has been restored"):
        ema.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["another class", "other shapes"])
def test_averages_of_ordinary_models_are_saved_as_before(how, tmp_path):
    Net = model_class()
    model = snparam.convert_model(
        {"another class": model_class()}.get(how, Net)(how == "other shapes")
    )
    assert model is not None
    ordinary = Net()
    ema = EMAModel(ordinary.parameters(), decay=0.5, model_cls=Net, model_config=ordinary.config)
    train(ordinary, ema)
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, Net)
    for found, right in zip(loaded.shadow_params, ema.shadow_params, strict=True):
        assert torch.equal(found, right)


def test_a_class_that_converts_itself_is_saved_as_it_is(tmp_path):
    """Its Parameters are in the same order on both sides."""
    Plain = model_class()

    class Net(Plain):
        @register_to_config
        def __init__(self):
            super().__init__()
            snparam.convert_model(self)

    model = Net()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=Net, model_config=model.config)
    train(model, ema)
    ema.save_pretrained(tmp_path)
    loaded = Plain.from_pretrained(tmp_path)
    for layer, original in zip((loaded.a, loaded.b), ema.shadow_params, strict=True):
        cosine = torch.cosine_similarity(layer.weight.flatten(), original.flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-6)
