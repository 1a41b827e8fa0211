"""The table of peaks, the measured one, and what becomes of devices that are not in the table."""

import types

import jax
import pytest

from lmjax.scaling import hardware
from lmjax.scaling.hardware import find_peak, memory_in_use, memory_size, peak_memory_in_use


def device(kind, platform="gpu", **attributes):
    """A stand-in for a device that this machine does not have."""
    attributes = {"memory_stats": lambda: None, "process_index": 0, **attributes}
    return types.SimpleNamespace(device_kind=kind, platform=platform, **attributes)


@pytest.mark.parametrize(
    "kind, teraflops",
    [
        ("Tesla V100-SXM2-16GB", 125),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("TPU v2", 23),
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
    ],
)
def test_a_device_as_jax_names_it(kind, teraflops):
    """By device: TPU v2, v3 and 7x are two devices a chip, v4 and v5p one."""
    peak = find_peak([device(kind)] * 4)
    assert peak.flops == pytest.approx(4e12 * teraflops, rel=1e-12)
    assert kind in peak.note and "4 x" in peak.note


def test_a_chip_whose_cores_are_separate_devices():
    assert find_peak([device("TPU v4", "tpu", num_cores=1)]).flops == 137.5e12
    assert find_peak([device("TPU v4", "tpu", num_cores=2)]).flops == 275e12


@pytest.mark.parametrize(
    "kind", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v99", "H100"]
)
def test_an_unknown_device_has_no_peak_and_says_so(kind):
    peak = find_peak([device("NVIDIA H200"), device(kind)])
    assert peak.flops is None and repr(kind) in peak.note
    assert memory_size(device(kind)) is None


def test_a_processor_is_measured_once_for_all_its_devices():
    one, all_of_them = find_peak(jax.devices()[:1]), find_peak()
    assert 1e9 < one.flops == all_of_them.flops < 1e15
    assert "measured float32" in one.note
    with jax.set_mesh(jax.make_mesh((len(jax.devices()),), ("data",))):  # a run's mesh is set
        hardware._measured_product.cache_clear()
        assert find_peak().flops > 1e9


def test_memory():
    megabyte = 2**20
    assert 50 * megabyte < memory_in_use() <= 1.1 * peak_memory_in_use()
    assert memory_size(device("NVIDIA H200")) == 141 * 10**9
    assert memory_size(device("TPU v3", "tpu")) == 16 * 2**30
    stats = {"bytes_limit": 7, "bytes_in_use": 3, "peak_bytes_in_use": 5}
    assert memory_size(device("anything", memory_stats=lambda: stats)) == 7


def test_memory_of_the_fullest_device(monkeypatch):
    devices = [
        device("x", memory_stats=lambda used=used: {"bytes_in_use": used, "peak_bytes_in_use": 9})
        for used in (3, 5)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_in_use() == 5 and peak_memory_in_use() == 9
