"""Every error that a user can cause, and the exit code that the command line gives it.

A message says in one line what was found, what was expected, and what to do.
"""


class LoraxError(Exception):
    """The root of lorax's errors; its message is one line, whatever was quoted in it."""

    exit_code = 4

    def __init__(self, message: object = ""):
        from lorax.text import one_line

        super().__init__(one_line(message))


class UsageError(LoraxError):
    """A call or a command that asks for something which does not exist or does not fit."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe whose keys or values are wrong; the message names the key."""


class PluginError(UsageError):
    """A user's own file that is no plugin or fails; the message has its line."""


class EnvironmentProblem(LoraxError):
    """A missing package or device, a full disk, a directory that cannot be written."""

    exit_code = 3


class FormatError(LoraxError):
    """A file that is damaged, hostile or of a kind that lorax does not read."""


class DataError(FormatError):
    """A row of training data that cannot be used; the message names file and line."""


class TemplateError(FormatError):
    """A chat template that fails, or that leaves its sandbox's bounds."""


class UnsupportedModel(FormatError):
    """A model whose architecture or options lorax does not cover."""


class AdapterError(LoraxError):
    """An adapter that does not fit its model, or an operation that its state does not allow."""


class QuantizationError(LoraxError):
    """A tensor that cannot be quantized as asked."""


class NumericalStop(LoraxError):
    """Training met a loss or gradient that is not finite, and stopped."""

    exit_code = 5
