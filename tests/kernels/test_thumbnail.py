import numpy as np
import pytest
from frames import as_tensors, noise_frame

from faceage.kernels import begin_thumbnail
from faceage.types import PIXEL_LAYOUTS


@pytest.mark.parametrize("size", [(400, 300), (1920, 1080), (384, 640)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "nv12", "p010le", "yuv444p12le", "gray16", "rgb24", "rgba64"])
def test_tensors_show_the_same(pixel_format, size):
    frame = noise_frame(pixel_format, *size)
    of_array, of_tensor = begin_thumbnail(frame)(), begin_thumbnail(as_tensors(frame))()
    assert of_array.luma.shape == of_tensor.luma.shape == (27, 48)
    assert np.abs(of_array.luma - of_tensor.luma).max() <= 1
    assert (of_array.luma != of_tensor.luma).mean() < 0.02
    np.testing.assert_allclose(of_array.histogram, of_tensor.histogram, atol=1e-6)
    assert abs(of_array.histogram.sum() - 1) < 1e-5


@pytest.mark.parametrize("pixel_format", PIXEL_LAYOUTS)
def test_codes_are_cut_to_eight_bits(pixel_format):
    frame = noise_frame(pixel_format, 320, 200)
    layout = PIXEL_LAYOUTS[pixel_format]
    frame.planes[0][:] = np.array(200 << (layout.bit_depth - 8) << layout.shift).astype(layout.dtype)
    for one in (frame, as_tensors(frame)):
        seen = begin_thumbnail(one)()
        np.testing.assert_array_equal(seen.luma, 200)
        assert seen.histogram[25] == 1
