"""LoHa: the element-wise product of two low-rank updates, of rank up to R^2 (https://arxiv.org/abs/2108.06098).

Legend: the weight is a matrix (out, in), R the rank, s the scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from smidgen.adapters.lycoris import Lycoris, LycorisConfig, unfold_core
from smidgen.adapters.targeted import uniform


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """The configuration of LoHa. Names and meanings are those of Hugging Face adapter files."""

    peft_type: ClassVar[str] = "LOHA"


class LoHa(Lycoris):
    """W + s (w1_a w1_b) * (w2_a w2_b), the product * element by element."""

    config_class = LoHaConfig

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter

    def build(self, out: int, channels: int, config: LoHaConfig) -> None:
        r, columns = config.r, self.layer.shape[1]
        a, b = ((r, out), (r, channels)) if self.keeps_kernel else ((out, r), (r, columns))
        for half in ("w1", "w2"):
            self.register_parameter(f"hada_{half}_a", uniform(*a, device=self.device))
            self.register_parameter(f"hada_{half}_b", uniform(*b, device=self.device))
        if self.keeps_kernel:
            self.hada_t1, self.hada_t2 = (uniform(*self.core, device=self.device) for _ in range(2))
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def product(self) -> Tensor:
        if self.keeps_kernel:
            first = unfold_core(self.hada_t1, self.hada_w1_a, self.hada_w1_b)
            return first * unfold_core(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        return (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
