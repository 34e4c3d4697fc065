"""Kernel Modulation: one frozen network, and for each task small modulators of all its kernels (arXiv 2203.15297).

``modulators.py`` has the ways in which a kernel may be modulated, ``switched.py`` the layer that holds its part of
every task, ``modulating.py`` puts these into a model and takes them out, ``files.py`` reads and writes what a task is.
``system.py`` trains a task with the runner of all systems, ``episodes.py`` many tasks of few images (meta-learning).

The paper's abstract could be read, and no more of it: that the network is frozen, that small modulators of a task
change all its kernels, that they have about 1.4 % of its parameters and only they are stored. What a modulator computes
is an option here, and none is claimed to be the paper's.
"""

from rl_kernels.systems.modulation.files import (
    load_task,
    load_task_state_dict,
    save_task,
    task_state_dict,
)
from rl_kernels.systems.modulation.modulating import (
    merge_task,
    modulate,
    remove_task,
    run_tasks,
    set_task,
    task_parameters,
    tasks_of,
)
from rl_kernels.systems.modulation.modulators import KINDS

__all__ = [
    "KINDS",
    "load_task",
    "load_task_state_dict",
    "merge_task",
    "modulate",
    "remove_task",
    "run_tasks",
    "save_task",
    "set_task",
    "task_parameters",
    "task_state_dict",
    "tasks_of",
]
