"""Turn a full Llama 4 checkpoint into a verified Int4 or FP8 artifact."""

# Packages of these names do the work. Loaded first, they don't take the place of the functions when they are used later.
import l4pack.budget
import l4pack.dequantize
import l4pack.evaluate
import l4pack.export
import l4pack.plan
import l4pack.quantize
import l4pack.verify  # noqa: F401
from l4pack.api import budget, dequantize, evaluate, export, inspect, package, plan, push, quantize, verify

__all__ = [
    "__version__",
    "budget",
    "dequantize",
    "evaluate",
    "export",
    "inspect",
    "package",
    "plan",
    "push",
    "quantize",
    "verify",
]
__version__ = "0.1.0"
