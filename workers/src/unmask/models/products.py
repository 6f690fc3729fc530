"""Products by weights in an arrangement of their own, in the place of ``nn.Linear`` and experts.

Whatever the arrangement (eight bits, or how a library likes them), weights come in as a checkpoint has them:
tensor by tensor, of which several may make one product's weight. A state dict does not have them any more.

Shape letters: O and I the outer and inner width of a product.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from unmask.models.base import LanguageModel
from unmask.models.moe import Experts
from unmask.models.transformer import Transformer

__all__ = [
    "Arrangement",
    "ExpertsProduct",
    "LinearProduct",
    "Product",
    "Weight",
    "expect",
    "products_of",
    "rearrange",
]


class Product(nn.Module, ABC):
    """What multiplies by weights that it is given."""

    parameters_of: ClassVar[tuple[str, ...]] = ("weight",)
    """The parameters, of what it takes the place of, that it is given."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether all weights are there."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all weights; others will be given."""

    @abstractmethod
    def put(self, parameter: str, index: tuple[int | slice, ...], weight: Tensor) -> None:
        """Take the part ``index`` of the float ``parameter``, as a slot has it; each part is given once."""


class Weight(ABC):
    """One weight (O, I): rows are taken as they come, and arranged when all are there."""

    def __init__(self, outer: int, inner: int) -> None:
        self.shape = outer, inner
        self._missing = outer

    @property
    def is_complete(self) -> bool:
        """Whether all rows are there."""
        return self._missing == 0

    def clear(self) -> None:
        """Forget the weight; another one will be given."""
        self._missing = self.shape[0]
        self._forget()

    def put(self, rows: slice, weight: Tensor) -> None:
        """Take the float weights of some rows; each row is given once."""
        self._take(rows, weight)
        self._missing -= len(weight)
        if self.is_complete:
            self._arrange()

    @abstractmethod
    def _take(self, rows: slice, weight: Tensor) -> None:
        """Keep some rows, or all of them."""

    @abstractmethod
    def _arrange(self) -> None:
        """Make of the rows what products are computed with."""

    @abstractmethod
    def _forget(self) -> None:
        """Let go of all that was taken and made."""


W = TypeVar("W", bound=Weight)


class LinearProduct(Product, Generic[W]):
    """What takes the place of ``nn.Linear`` and has one :class:`Weight`."""

    def __init__(self, weight: W) -> None:
        """With a weight that is not there yet."""
        super().__init__()
        self._weight = weight

    @property
    def is_complete(self) -> bool:
        """See :attr:`Product.is_complete`."""
        return self._weight.is_complete

    def clear(self) -> None:
        """See :meth:`Product.clear`."""
        self._weight.clear()

    def put(self, parameter: str, index: tuple[int | slice, ...], weight: Tensor) -> None:
        """See :meth:`Product.put`."""
        assert parameter == "weight", parameter
        self._weight.put(_rows(index), weight)


class ExpertsProduct(Product, Generic[W]):
    """What takes the place of :class:`~unmask.models.moe.Experts` and has two of :class:`Weight` for each."""

    parameters_of = ("gate_up_proj", "down_proj")

    def __init__(self, gate_up: list[W], down: list[W]) -> None:
        """With weights that are not there yet, of expert after expert."""
        super().__init__()
        self._gate_up, self._down = gate_up, down

    @property
    def is_complete(self) -> bool:
        """See :attr:`Product.is_complete`."""
        return all(weight.is_complete for weight in (*self._gate_up, *self._down))

    def clear(self) -> None:
        """See :meth:`Product.clear`."""
        for weight in (*self._gate_up, *self._down):
            weight.clear()

    def put(self, parameter: str, index: tuple[int | slice, ...], weight: Tensor) -> None:
        """See :meth:`Product.put`; of one expert."""
        expert, *rows = index
        assert isinstance(expert, int)
        weights = {"gate_up_proj": self._gate_up, "down_proj": self._down}[parameter]
        weights[expert].put(_rows(rows), weight)


def _rows(index: Sequence[int | slice]) -> slice:
    """The rows that an index is about; all of them where it says nothing."""
    rows = index[0] if index else slice(None)
    assert isinstance(rows, slice)
    return rows


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What takes the place of what; made without weights, for the devices of those that it replaces."""

    linear: Callable[[nn.Linear | nn.Embedding], Product]
    """Of a linear layer, or of an embedding that is the output layer as well."""
    experts: Callable[[Experts], Product]
    tied_output: bool
    """Whether a model whose embedding is its output layer gets an output layer of its own."""


def expect(model: LanguageModel, arrangement: Arrangement) -> None:
    """Replace what multiplies by weights; the replacements wait for theirs. The router stays as it is.

    Args:
        model: On any device, the meta device too.
        arrangement: Of the weights.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                assert getattr(child, "bias", None) is None, f"{name}: biases are not known here"
                setattr(module, name, arrangement.linear(child))
            elif isinstance(child, Experts):
                setattr(module, name, arrangement.experts(child))
    if arrangement.tied_output and isinstance(model, Transformer) and model.head is None:
        model.head = arrangement.linear(model.embedding)


def products_of(model: LanguageModel) -> dict[str, Product]:
    """The modules that wait for weights, or have them, by the names of the parameters that they take."""
    return {
        f"{name}.{parameter}": module
        for name, module in model.named_modules()
        if isinstance(module, Product)
        for parameter in module.parameters_of
    }


@torch.no_grad()
def rearrange(model: LanguageModel, arrangement: Arrangement) -> LanguageModel:
    """The same model in that arrangement, made in place; float weights are let go one after the other."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tied = isinstance(model, Transformer) and model.head is None
    expect(model, arrangement)
    for name, product in products_of(model).items():
        weight = weights["embedding.weight"] if tied and name == "head.weight" else weights.pop(name)
        parameter = name.rpartition(".")[2]
        if product.parameters_of == ("weight",):
            product.put(parameter, (), weight)
        else:
            for expert, own in enumerate(weight):
                product.put(parameter, (expert,), own)
    return model
