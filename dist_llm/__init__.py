"""dist_llm: pretrain language models. Tests show that every parallel layout computes the same optimizer step.

`dist_llm/api.py` defines the public Python API, such as `dist_llm.train("demo")`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_llm.api import UserError, evaluate, generate, load_model, prepare, read_config, train

__version__ = "0.2.0"
__all__ = ["UserError", "evaluate", "generate", "load_model", "prepare", "read_config", "train"]


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that `import dist_llm` stays fast."""
    if name not in __all__:
        raise AttributeError(f"module 'dist_llm' has no attribute '{name}'")
    from dist_llm import api

    return getattr(api, name)
