# SPDX-License-Identifier: Apache-2.0
"""Model cards whose numbers can be checked: written from the files of the evaluations, and evaluated again."""

from .check import CardCheck, CheckedFigure, check_card
from .evaluate_again import EvaluatedAgain, evaluate_again
from .writer import UnmeasuredNumberError, write_card


__all__ = [
    "CardCheck",
    "CheckedFigure",
    "EvaluatedAgain",
    "UnmeasuredNumberError",
    "check_card",
    "evaluate_again",
    "write_card",
]
