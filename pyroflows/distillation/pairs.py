"""Layers of a teacher and of a student that stand for each other."""

from __future__ import annotations

from typing import NamedTuple

from pyroflows.transforms import Autoregressive


class Pair(NamedTuple):
    """A layer of the teacher (turned around: cheap from data to base) and the student's."""

    index: int
    teacher: Autoregressive
    student: Autoregressive

    @property
    def gaussian(self) -> bool:
        """Whether both are conditional Gaussians where Gaussian noise goes in."""
        return self.teacher.family.keeps_gaussian and self.student.family.keeps_gaussian
