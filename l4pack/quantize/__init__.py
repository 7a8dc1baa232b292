"""Carrying out a plan: tasks, threads, a journal, and a folder that appears when it is complete."""
