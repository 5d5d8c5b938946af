"""The one table of tolerances: what a fast implementation may differ from its reference."""

GATHER_ATOL = 2e-5
"""Crops, RGB in [-1, 1]: float32 rounding of sampling positions and sums (1 / 255 is 4e-3)."""

ADD_ATOL_CODES = 1
"""Code values after `apply_change`: float32 and float64 may round a tie differently ..."""

ADD_MAX_TIES = {8: 3e-4, 10: 6e-4, 12: 2e-3, 16: 0.03}
"""... in this share of the samples, by bit depth: a code of 16 bits is not far above float32's rounding."""

ROUND_TRIP_ATOL = {8: 0.012, 10: 0.006, 16: 0.005}
"""Crop after adding a smooth delta of up to 0.28 minus crop before, by bit depth: rounding to codes,
and 0.0033 of resampling there and back."""

KERNEL_ATOL = 1e-5
"""Crops and means, RGB in [-1, 1], of Triton kernels: float32 rounding of sums over some hundred samples."""

KERNEL_ADD_MAX_TIES = {8: 1e-3, 10: 2e-3, 12: 3e-3, 16: 0.05}
"""As `ADD_MAX_TIES`, for frames so small that one sample is 6e-4 of them."""
