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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("sm_count: 132", "sm_count: many"), "gpu: sm_count must be of type int, got 'many'"),
        (("  sm_count: 132\n", ""), "gpu: sm_count is missing"),
        (("sm_count", "sm_cuont"), "gpu has no field 'sm_cuont'; did you mean 'sm_count'"),
        (("gpu:", "tpu: {topology: v5e, host: 2x2}\ngpu:"), "must have one of gpu and tpu"),
        (("bytes_per_second: 4.8e+12\n", ""), "bytes_per_second is missing"),
    ],
)
def test_unsound_sheets_are_refused(tmp_path, monkeypatch, change, message):
    text = (configs.HARDWARE / "h200.yaml").read_text()
    assert change[0] in text
    (tmp_path / "h200.yaml").write_text(text.replace(*change))
    monkeypatch.setattr(configs, "HARDWARE", tmp_path)
    with pytest.raises(ConfigError, match=message):
        configs.load_chip("h200")
