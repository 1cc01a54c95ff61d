"""Settings for every test: eight fake CPU devices, strict ranks, a compile cache of their own."""

import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Programs of equal tests are compiled once per machine, not once per worker and run.
CACHE = Path(tempfile.gettempdir()) / f"jaxinfer-tests-{jax.__version__}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Property tests draw the same examples every time: a red run can be repeated.
settings.register_profile("jaxinfer", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("jaxinfer")

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_addoption(parser):
    parser.addoption(
        "--record-kernels", action="store_true", help="write which kernels ran to docs/kernels.json"
    )


def pytest_configure(config):
    if config.getoption("--record-kernels") and not hasattr(config, "workerinput"):
        from tests.kernel_record import Recorder

        config.pluginmanager.register(Recorder())


@pytest.fixture
def kernel_ran(record_property):
    """`kernel_ran(op, backend, dtype, how)`: what a test runs, for `tests/kernel_record.py`."""

    def note(*words: str) -> None:
        record_property("kernel", words)

    return note


@pytest.fixture
def gpu_interpreter():
    """GPU kernels that a test calls are interpreted."""
    from jaxinfer.kernels.choice import GPU_NEEDS_JAX

    if jax.__version_info__ < GPU_NEEDS_JAX:
        pytest.skip("the GPU interpreter is public from JAX 0.11 on")
    from tests.kernels.gpu_interpreter import interpreting, parameters

    with interpreting(parameters()):
        yield


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of checkpoints, tokenizers and expected values made by make_fixtures.py."""
    return FIXTURES


# Every axis divides by 4, so tensor parallelism over 1, 2 and 4 devices is possible.
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256,
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 256, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a configuration and no weights, for load_format="dummy"."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder
