"""Every error that jaxinfer raises on purpose.

Each message names the field, file or component at fault and what to do about it.  Errors about
values that the caller passed are also `ValueError`s, so code that knows nothing of jaxinfer can
catch them.
"""


class JaxinferError(Exception):
    """The parent of all errors below."""


class ConfigError(JaxinferError, ValueError):
    """A field of `ModelConfig` or `EngineConfig`, or a preset, is unknown or out of range."""


class RequestError(JaxinferError, ValueError):
    """One request is at fault: its prompt or its sampling parameters.  Other requests run on."""


class DatasetError(JaxinferError, ValueError):
    """A benchmark's data set has a malformed line, named by its number, or no requests."""


class CheckpointError(JaxinferError):
    """A model folder is incomplete, or a file in it is missing, truncated or corrupt."""


class UnsupportedModelError(CheckpointError):
    """The model folder is sound, but its architecture or a feature of it is not implemented."""


class TokenizerError(JaxinferError):
    """The tokenizer is missing or unreadable, or has no chat template although one is needed."""


class InsufficientMemoryError(JaxinferError, MemoryError):
    """The model, its KV cache or its buffers do not fit; the message has the sum by component."""


class DeviceError(JaxinferError):
    """A command needs an accelerator, and there is none, or another than it was told."""


class ToolchainError(JaxinferError):
    """What compiles for a target is not installed; the message has the pip command."""


class CompileError(JaxinferError):
    """A program does not compile for a target; the message is the compiler's."""


class ShapeError(JaxinferError, ValueError):
    """Two arrays disagree about the size of an axis letter (raised while tracing)."""


class BucketError(JaxinferError):
    """A step asked for a shape that was not compiled at start; names the nearest bucket."""


class PageError(JaxinferError):
    """The page bookkeeping contradicts itself: a bug in the caller or in jaxinfer."""


class EngineClosedError(JaxinferError, RuntimeError):
    """The `LLM` was closed, or a step failed on the device and its state is gone."""


class ComparisonError(JaxinferError):
    """Two engines that should run the same model generate different tokens."""
