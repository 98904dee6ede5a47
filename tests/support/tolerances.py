"""How near a clipped gradient must be to the float64 reference, by its dtype."""

import torch

TOLERANCES = {
    # one rounding of the coefficient and one of the product
    torch.float64: {"rtol": 1e-15, "atol": 0.0},
    torch.float32: {"rtol": 1.3e-7, "atol": 0.0},
    torch.complex64: {"rtol": 2e-7, "atol": 1e-12},
    # half a unit in the last place of 8 and 11 bits
    torch.bfloat16: {"rtol": 4e-3, "atol": 0.0},
    # fp16 products below 6e-5 are subnormal: an absolute error of 2**-25
    torch.float16: {"rtol": 5e-4, "atol": 6e-8},
}

# The total norm comes back in float32: half a unit in its last place.
NORM = {"rtol": 6e-8, "atol": 0.0}
