import pytest
import torch
from torch import nn

from kd_core.utils.errors import UserError
from kd_core.utils.state_dict import check_fit, weights_digest


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.bias"), r"^net\.pth lacks 1 weights of the model, the first is 0\.bias$"),
        (lambda state: state.update(extra=torch.ones(1)), r"^net\.pth has 1 weights that .* no place for, .* extra$"),
        (
            lambda state: state.update({"0.bias": torch.ones(4)}),
            r"^net\.pth does not fit the model: 1 weights .* the first is 0\.bias with \(4,\), expected \(3,\)$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(change, message):
    state = net().state_dict()
    check_fit(state, net().state_dict(), "net.pth")
    change(state)
    with pytest.raises(UserError, match=message):
        check_fit(state, net().state_dict(), "net.pth")


def test_the_digest_tells_one_changed_bit_and_a_changed_name():
    state = net().state_dict()
    first = weights_digest(state)
    assert weights_digest(net().state_dict()) == first
    state["0.bias"][1] = torch.nextafter(state["0.bias"][1], torch.tensor(9.0))
    assert weights_digest(state) != first
    renamed = {name.replace("0.bias", "0.shift"): value for name, value in net().state_dict().items()}
    assert weights_digest(renamed) != first
    counted = net().state_dict()
    counted["1.num_batches_tracked"] += 1
    assert weights_digest(counted) != first
