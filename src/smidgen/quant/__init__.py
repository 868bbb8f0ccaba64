"""How a weight is stored in 4 or 8 bits: code books, quantising, files."""

from smidgen.kernels.dequantize import Packed, dense
from smidgen.quant.files import from_tensors, to_tensors
from smidgen.quant.from_bitsandbytes import packed_of
from smidgen.quant.quantize import BLOCK_SIZES, KINDS, bits, quantize

__all__ = ["BLOCK_SIZES", "KINDS", "Packed", "bits", "dense", "from_tensors", "packed_of", "quantize", "to_tensors"]
