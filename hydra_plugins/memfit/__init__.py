"""memfit: a Hydra plugin that makes a post-training launch fit its accelerator.

Hydra imports this package in every Hydra application of the environment, so it holds nothing but the version. The
rooms beside it (``hardware``, ``model``, ``memory``, ...) are folders without ``__init__.py``: Hydra's plugin scan does
not walk them, and they still import as ``hydra_plugins.memfit.memory.states``.
"""

__version__ = "0.1.0"
