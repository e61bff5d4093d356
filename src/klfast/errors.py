"""The exceptions that klfast adds to Python's own."""

__all__ = ["BackendUnavailable"]


class BackendUnavailable(RuntimeError):  # noqa: N818 - the public name says what happened
    """A backend was asked for, by name or by where the arrays live, and cannot run here."""
