"""`PackedRows`: a linear layer that GGUF stores as several matrices, or with its rows or columns in another order."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dynquant.kernels import ops
from dynquant.packed.layers import PackedModule

ROWS_PREFIX = "rows_"


class PackedRows(PackedModule, nn.Linear):
    """y = x Wᵀ + b, where W is some packed matrices one below the other, `rows_0`, `rows_1`, ...

    With `has_row_order`, entry i of y comes from row `row_order[i]` of these; with `has_input_order`, their column j
    is multiplied with entry `input_order[j]` of x. A matrix may be float.

    Raises:
        PlanError: no quant type has this name.
        ValueError: `in_features` does not divide into blocks.
    """

    def __init__(
        self,
        in_features: int,
        rows: Mapping[str, int],
        types: Mapping[str, str],
        *,
        bias: bool = False,
        has_row_order: bool = False,
        has_input_order: bool = False,
    ) -> None:
        self._start({name: types[name] for name in rows})
        self.in_features, self.out_features = in_features, sum(rows.values())
        for name, count in rows.items():
            self._add_weight(name, count, in_features)
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        orders = {"row_order": self.out_features, "input_order": in_features}
        for name, length in orders.items():
            has_order = has_row_order if name == "row_order" else has_input_order
            self.register_buffer(name, torch.zeros(length, dtype=torch.int32) if has_order else None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The first matrix: PEFT and transformers look here for a linear layer's device."""
        return getattr(self, next(iter(self.types)))

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.input_order is None else input.index_select(-1, self.input_order)
        y = torch.cat([self._multiply(name, x) for name in self.types], dim=-1)
        y = y if self.row_order is None else y.index_select(-1, self.row_order)
        return y if self.bias is None else y + self.bias

    def in_order(self, weights: Tensor) -> Tensor:
        """Return rows and columns of all matrices, [out_features, in_features], as W has them."""
        if self.input_order is not None:
            weights = weights.index_select(1, self.input_order.long().argsort())
        return weights if self.row_order is None else weights.index_select(0, self.row_order)

    def in_stored_order(self, weights: Tensor) -> dict[str, Tensor]:
        """Return the matrices by name that `in_order` makes W of."""
        if self.input_order is not None:
            weights = weights.index_select(1, self.input_order)
        if self.row_order is not None:
            weights = weights.index_select(0, self.row_order.long().argsort())
        return dict(zip(self.types, weights.split([len(getattr(self, name)) for name in self.types]), strict=True))

    def _multiply(self, name: str, x: Tensor) -> Tensor:
        weight, type_name = getattr(self, name), self.types[name]
        if name not in self.packed_names:
            return nn.functional.linear(x, weight.to(x.dtype))
        x = x if self.round_input is None else self.round_input(x, type_name)
        return ops.linear(x, weight, type_name, layout=self.layout)
