"""Meshes that are given as text. On several devices: `engine/test_processes.py`."""

import jax
import pytest

from kivi_jax.mesh import lay_out, local_mesh, read_mesh_shape


def test_shapes_are_read():
    assert read_mesh_shape("4x1") == (4, 1)
    assert read_mesh_shape("16x8") == (16, 8)


@pytest.mark.parametrize(
    "text", ["4", "4x", "x4", "0x4", "4x0", "-1x4", "4 x 1", "4X1", "2x2x1", "1x1\n", "²x1"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="mesh must be DATAxMODEL, as '4x1' or '1x4' of four devices, got"):
        read_mesh_shape(text)


def test_meshes_have_all_devices():
    mesh = local_mesh("1x1")
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert list(mesh.devices.flat) == jax.local_devices()
    with pytest.raises(ValueError, match="mesh 1x4 is of 4 devices, and there are 1"):
        lay_out("1x4", jax.devices())
