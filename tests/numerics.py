"""The one table of tolerances: what a fast implementation may differ from its reference."""

GATHER_ATOL = 2e-5
"""Crops, RGB in [-1, 1]: float32 rounding of sampling positions and sums (1 / 255 is 4e-3)."""

ADD_ATOL_CODES = 1
"""Code values after `add_delta`: float32 and float64 may round a tie differently ..."""

ADD_MAX_TIES = 2e-3
"""... but only in this share of the samples."""

ROUND_TRIP_ATOL = {8: 0.02, 10: 0.012, 16: 0.011}
"""Crop after adding a smooth delta minus crop before, by bit depth: rounding to codes, and the resampling
there and back (at most 0.011 for the delta of the tests)."""
