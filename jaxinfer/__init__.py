"""jaxinfer: LLM inference in JAX for TPU, GPU and CPU.

    from jaxinfer import LLM, SamplingParams

    with LLM("demo") as llm:
        for output in llm.generate(["def add(a, b):"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

`import jaxinfer` loads neither jax nor NumPy: the public names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout kernels/, shardings/ and configs/ lie beside this folder; in a wheel, inside it.
# Must stand before any import of a sub-package.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from jaxinfer.config import EngineConfig, ModelConfig
    from jaxinfer.llm import LLM
    from jaxinfer.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "Logprob",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "__version__",
]

_HOME = {
    "LLM": "jaxinfer.llm",
    "CompletionOutput": "jaxinfer.request",
    "EngineConfig": "jaxinfer.config",
    "Logprob": "jaxinfer.request",
    "ModelConfig": "jaxinfer.config",
    "RequestOutput": "jaxinfer.request",
    "SamplingParams": "jaxinfer.request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
