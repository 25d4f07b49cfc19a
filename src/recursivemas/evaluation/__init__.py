"""Evaluation: tasks, scorers, arms compared on the same questions and the same meter, reports."""
