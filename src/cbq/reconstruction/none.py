"""A window that is not learned: the other end of every ablation of reconstruction."""

import lightning as L

from cbq.reconstruction.window_solver import Task, WindowSolver


class NoReconstruction(WindowSolver):
    """Solves nothing: every linear is rounded to nearest (the upper half of Table 3a).

    Args:
        loss: Eq. 7; only measured.
    """

    def learn_(self, task: Task, callbacks: list[L.Callback]) -> tuple[float, str | None]:
        return task.first, None
