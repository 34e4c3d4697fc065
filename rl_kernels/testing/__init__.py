"""What users, and this package's own tests, check gradients and memory with, and measure time with.

``accuracy.py`` judges errors against float64 beside plain torch's; ``gradients.py`` checks a whole layer by it;
``memory.py`` measures the peak of a call; ``allocations.py`` fills fresh memory with NaN; ``clock.py`` times calls.
"""

from rl_kernels.testing.accuracy import Comparison, assert_as_accurate, compare
from rl_kernels.testing.allocations import poisoned
from rl_kernels.testing.clock import Clock
from rl_kernels.testing.gradients import Report, check_gradients
from rl_kernels.testing.memory import peak_memory

__all__ = [
    "Clock",
    "Comparison",
    "Report",
    "assert_as_accurate",
    "check_gradients",
    "compare",
    "peak_memory",
    "poisoned",
]
