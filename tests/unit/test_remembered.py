"""What is computed from a tensor is computed once, for as long as the tensor is there and as it was."""

import gc
import weakref

import pytest
import torch

from pared.remembered import once_per_tensor


class Counted:
    """Doubles a tensor, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 2 * tensor


@pytest.fixture
def counted() -> Counted:
    return Counted()


def remembering(counted: Counted):
    return once_per_tensor(lambda tensor, *_: counted(tensor))


def test_the_same_tensor_is_computed_with_once(counted: Counted):
    double, tensor = remembering(counted), torch.ones(3)
    assert double(tensor, 1) is double(tensor, 1)
    assert counted.calls == 1


def test_an_equal_tensor_is_another(counted: Counted):
    double, tensor = remembering(counted), torch.ones(3)
    assert torch.equal(double(tensor), double(tensor.clone()))
    assert counted.calls == 2


def test_other_arguments_are_other_results(counted: Counted):
    double, tensor, other = remembering(counted), torch.ones(3), torch.ones(3)
    for rest in ((), (1,), (True,), (1.0,), ((1, 2),), (other,), (other.clone(),), (1, 2)):
        double(tensor, *rest)
    assert counted.calls == 8
    double(tensor, other)
    assert counted.calls == 8


def test_a_tensor_that_was_changed_is_computed_with_anew(counted: Counted):
    double, tensor = remembering(counted), torch.ones(3)
    double(tensor)
    tensor += 1
    assert torch.equal(double(tensor), torch.full((3,), 4.0))


def test_nothing_outlives_the_tensor(counted: Counted):
    double = remembering(counted)
    alive = [torch.ones(3)]
    result = weakref.ref(double(alive[0]))
    assert result() is not None
    alive.clear()
    gc.collect()
    assert result() is None


def test_a_tensor_that_gradients_are_wanted_of_is_not_remembered(counted: Counted):
    double, tensor = remembering(counted), torch.ones(3, requires_grad=True)
    double(tensor)
    double(tensor)
    assert counted.calls == 2
    with torch.inference_mode():
        inference = torch.ones(3)
    double(inference)
    double(inference)
    assert counted.calls == 4
