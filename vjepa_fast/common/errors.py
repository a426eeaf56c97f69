"""Errors a user can cause; the command line shows their message without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something outside the program is wrong (a file, a disk, a checkpoint). Exit code 1."""

    exit_code = 1


class ConfigError(UserError):
    """A flag, a key or a value is wrong. Exit code 2."""

    exit_code = 2
