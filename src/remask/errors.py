"""The one exception users see: a plain sentence that names the fact or field and the remedy."""

from __future__ import annotations


class RemaskError(Exception):
    """Bad input or an operation that would be wrong; the command line prints it and exits with code 2."""


class MissingOptionError(RemaskError):
    """A checkpoint does not say something that the user must: its family, or its mask id."""


class TooLongError(RemaskError):
    """A text has more tokens than the model's context."""


class NothingToForgetError(RemaskError):
    """The model is already at or below the level that forgetting would bring it to."""
