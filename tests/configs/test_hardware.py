"""The sheets of chips."""

import pytest

from jaxinfer import configs
from jaxinfer.errors import ConfigError

# memory GB, B/s, bf16 flops: dense, as the vendors' data sheets have them.
PUBLISHED = {
    "a100": (80, 2.039e12, 312e12), "l4": (24, 0.3e12, 121e12), "h100": (80, 3.35e12, 989.4e12),
    "h200": (141, 4.8e12, 989.4e12), "b200": (180, 8e12, 2250e12), "tpu-v5e": (16, 8.19e11, 197e12),
    "tpu-v5p": (102, 2.765e12, 459e12), "tpu-v6e": (32, 1.638e12, 918e12),
    "tpu7x": (206, 7.38e12, 2307e12),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_sheets_are_as_published(name):
    chip = configs.load_chip(name)
    memory, bandwidth, flops = PUBLISHED[name]
    assert chip.memory_bytes / 1e9 == pytest.approx(memory, abs=0.5)
    assert (chip.bytes_per_second, chip.flops["bfloat16"]) == (bandwidth, flops)
    assert chip.source
    for kind in chip.device_kinds:
        assert configs.find_chip(kind) == chip


def test_every_chip_is_listed_and_no_other_is_found():
    assert configs.chips() == sorted(PUBLISHED)
    assert configs.find_chip("cpu") is None
    with pytest.raises(ConfigError, match="there is no chip 'h300'; there are: a100, "):
        configs.load_chip("h300")
